"""What our callbacks have in common: when something is due, and where it goes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lace_lightning.modules import SampledGroups, ThreadedModule
from lace_lightning.tracking import MLflowLogger


def current_step(trainer: Trainer) -> int:
    """The step that Lightning itself gives to what modules log; counts batches, not optimizer steps."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_due(trainer: Trainer, every_n_steps: int | None) -> bool:
    """Whether this training batch is to be reported; None means the trainer's ``log_every_n_steps``."""
    interval = trainer.log_every_n_steps if every_n_steps is None else every_n_steps  # type: ignore[attr-defined]
    return interval > 0 and (current_step(trainer) + 1) % interval == 0


def check_interval(every_n_steps: int | None) -> int | None:
    """The interval itself.

    Raises:
        ValueError: it is below 1.
    """
    if every_n_steps is not None and every_n_steps < 1:
        raise ValueError(f"every_n_steps={every_n_steps} must be at least 1, or null for trainer.log_every_n_steps")
    return every_n_steps


def mlflow_loggers(trainer: Trainer) -> list[MLflowLogger]:
    """The loggers that take pictures, tables and pages; none on ranks above zero, where nothing need be drawn."""
    return [logger for logger in trainer.loggers if isinstance(logger, MLflowLogger)] if trainer.is_global_zero else []


def sampled_in(outputs: Any) -> SampledGroups | None:
    """The groups that a step of one of our stages sampled, if it did."""
    return outputs.get("sampled") if isinstance(outputs, dict) else None


def threaded(pl_module: LightningModule) -> ThreadedModule:
    """The module as one of our stages.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(pl_module, ThreadedModule):
        raise TypeError(f"this callback observes the stages of lace_lightning.modules, not {type(pl_module).__name__}")
    return pl_module
