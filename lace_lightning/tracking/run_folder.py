"""Where the files of a run lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """The run's folder: ``save_dir/name/version`` of its first logger, else that of its checkpoints.

    That is ``<default_root_dir>/checkpoints``, as for ModelCheckpoint, unless a ``dirpath`` was given.
    """
    logger = trainer.logger
    if logger is None or not logger.save_dir:
        given = getattr(trainer.checkpoint_callback, "dirpath", None)
        return Path(given or Path(trainer.default_root_dir, "checkpoints"))
    return Path(logger.save_dir, str(logger.name), str(logger.version))


def checkpoint_folder(trainer: Trainer) -> Path:
    """Folder of the run's checkpoints: that of its ModelCheckpoint if it has one. Call it on every rank."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    if folder is None:
        own = run_folder(trainer)
        folder = str(own if own.name == "checkpoints" else own / "checkpoints")
    return Path(trainer.strategy.broadcast(str(folder)))
