"""Watching how threads tag themselves."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lace_lightning.callbacks.reporting import (
    check_interval,
    current_step,
    is_due,
    mlflow_loggers,
    sampled_in,
    threaded,
)
from lace_lightning.figures import confusion_figure
from lace_lightning.metrics import TagConfusion
from lace_lightning.metrics.names import TAG_METRICS
from lace_lightning.metrics.tags import TAGS, VERDICTS


class TagMonitor(Callback):
    """Logs ``train/tags/…`` of training rollouts, and verdicts against tags after each validation and test.

    The counts come as picture ``tags/confusion`` and table ``tags``, in ``lace test`` under ``test/``.

    Args:
        every_n_steps: training batches from one report to the next; null: the trainer's ``log_every_n_steps``.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = check_interval(every_n_steps)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log adherence if it is due and the stage samples groups."""
        sampled = sampled_in(outputs)
        if sampled is None or not trainer.loggers or not is_due(trainer, self.every_n_steps):
            return
        confusion = TagConfusion().to(pl_module.device)
        confusion.update(sampled.groups, sampled.verdicts)
        values = confusion.compute()
        metrics = {f"train/tags/{name}": float(values[name]) for name in TAG_METRICS}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=current_step(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the counts of the validation."""
        if not trainer.sanity_checking:
            self._show(trainer, pl_module, "val", "")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the counts of the test."""
        self._show(trainer, pl_module, "test", "test/")

    def _show(self, trainer: Trainer, pl_module: LightningModule, phase: str, prefix: str) -> None:
        confusion = threaded(pl_module).evaluation_metrics(phase)[1].compute()["confusion"]
        for logger in mlflow_loggers(trainer):
            logger.log_image(f"{prefix}tags/confusion", confusion_figure(confusion), current_step(trainer))
            logger.log_table(confusion_rows(confusion), f"{prefix}tags")


def confusion_rows(confusion: Tensor) -> list[dict[str, object]]:
    """The (3, 4) counts with one row per verdict and one column per tag."""
    tags = [str(tag or "none") for tag in TAGS]
    return [
        {"verdict": str(verdict), **dict(zip(tags, counts, strict=True))}
        for verdict, counts in zip(VERDICTS, confusion.tolist(), strict=True)
    ]
