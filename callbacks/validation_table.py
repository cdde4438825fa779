"""The outcome of an evaluation as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lace_lightning.callbacks.reporting import mlflow_loggers, sampled_in, threaded
from lace_lightning.metrics import EvaluationSummary
from lace_lightning.tracking.run_folder import run_folder
from lace_lightning.whole_file import write_text


class ValidationTable(Callback):
    """Prints the metrics of ``lace validate`` and ``lace test`` with their 95 % intervals and, if known, the ceiling.

    The same goes to MLflow as table ``val_summary`` or ``test_summary``.

    Args:
        path: JSON file for ``metrics``, ``intervals``, ``num_groups`` and ``ceiling``; null: ``val_summary.json`` or
            ``test_summary.json`` in the run's folder.
        during_fit: also after each validation of ``lace fit``.

    Raises:
        ValueError: ``path`` is a folder.
    """

    def __init__(self, path: str | None = None, during_fit: bool = False) -> None:
        if path is not None and Path(path).is_dir():
            raise ValueError(f"path={path!r} of ValidationTable is a folder: name a file, say {path}/summary.json")
        self.path = path
        self.during_fit = during_fit
        self._counts = [0.0, 0.0, 0.0]  # groups, sum of known ceilings, groups with a known ceiling

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the file's folder, before the work starts."""
        if self.path is not None:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._counts = [0.0, 0.0, 0.0]

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._counts = [0.0, 0.0, 0.0]

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Count the groups and add up their ceilings."""
        self._count(pl_module, outputs)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Count the groups and add up their ceilings."""
        self._count(pl_module, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, if it was asked for."""
        is_asked_for = self.during_fit or trainer.state.fn == TrainerFn.VALIDATING
        if is_asked_for and not trainer.sanity_checking:
            self._report(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        self._report(trainer, pl_module, "test")

    def _count(self, pl_module: LightningModule, outputs: Any) -> None:
        sampled = sampled_in(outputs)
        if sampled is None:
            return
        task = threaded(pl_module).data.task
        for group in sampled.groups:
            ceiling = task.success_ceiling(group.problem, len(group.threads))
            new = (1.0, ceiling or 0.0, float(ceiling is not None))
            self._counts = [old + more for old, more in zip(self._counts, new, strict=True)]

    def _report(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Needs every rank; rank zero prints and writes."""
        summary = self._summary(trainer, pl_module, phase)
        if not trainer.is_global_zero:
            return
        from rich import print as rich_print

        rich_print(summary.table(phase))
        path = run_folder(trainer) / f"{phase}_summary.json" if self.path is None else Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(summary.as_json(), indent=2) + "\n")
        for logger in mlflow_loggers(trainer):
            logger.log_table(summary.rows(), f"{phase}_summary")

    def _summary(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> EvaluationSummary:
        groups, tags = threaded(pl_module).evaluation_metrics(phase)
        metrics = groups.compute() | {"one_tag": tags.compute()["one_tag"]}
        totals = trainer.strategy.reduce(torch.tensor(self._counts, device=pl_module.device), reduce_op="sum")
        assert isinstance(totals, torch.Tensor)
        num_groups, ceilings, num_ceilings = totals.tolist()
        return EvaluationSummary(
            metrics={name: float(value) for name, value in metrics.items()},
            intervals=groups.intervals(),
            num_groups=int(num_groups),
            ceiling=ceilings / num_groups if num_groups and num_ceilings == num_groups else None,
        )
