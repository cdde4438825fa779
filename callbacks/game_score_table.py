"""The scores of threads that play games, as a table."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lace_lightning.agents.scores import GameScores
from lace_lightning.callbacks.reporting import mlflow_loggers, sampled_in
from lace_lightning.metrics import EvaluationSummary
from lace_lightning.tracking.run_folder import run_folder
from lace_lightning.whole_file import write_text


class GameScoreTable(Callback):
    """Prints best score, mean score and win rate after every evaluation of a task of ``lace_lightning.agents``.

    The same goes to ``val_scores.json`` or ``test_scores.json`` in the run's folder and, as a table, to MLflow.
    """

    def __init__(self) -> None:
        self._scores = GameScores()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._scores.to(pl_module.device).reset()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._scores.to(pl_module.device).reset()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Add the scores of a batch."""
        self._add(outputs)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Add the scores of a batch."""
        self._add(outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        if not trainer.sanity_checking:
            self._report(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        self._report(trainer, "test")

    def _add(self, outputs: Any) -> None:
        sampled = sampled_in(outputs)
        if sampled is not None:
            self._scores.update(sampled.groups)

    def _report(self, trainer: Trainer, phase: str) -> None:
        """Needs every rank; rank zero prints and writes."""
        metrics = {name: float(value) for name, value in self._scores.compute().items()}
        summary = EvaluationSummary(metrics, self._scores.intervals(), self._scores.num_groups(), ceiling=None)
        if not trainer.is_global_zero:
            return
        from rich import print as rich_print

        rich_print(summary.table(f"{phase} scores"))
        path = run_folder(trainer) / f"{phase}_scores.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(summary.as_json(), indent=2) + "\n")
        for logger in mlflow_loggers(trainer):
            logger.log_table(summary.rows(), f"{phase}_scores")
