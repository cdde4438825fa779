"""Checkpoint files that are whole or absent, whatever kills the process that writes them, and are checked when read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lace_lightning.checkpoints import read_checkpoint
from lace_lightning.shards import aside, is_sharded
from lace_lightning.whole_file import whole_file
from lace_lightning.write_queue import WriteQueue

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: a Trainer plugin.

    Lightning's own writer goes through the temporary folder of the system; where that is another file system (a RAM
    disk, a container's layer) the last step is a copy, and a kill in its middle leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save to a local path; URLs (``s3://…``) go Lightning's own way.

        Raises:
            OSError: the disk is full; an earlier file of that name is as it was.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as unfinished:
            with unfinished.open("wb") as stream:
                torch.save(checkpoint, stream)  # given a path, it would not say that the disk is full
            if is_sharded(target):  # of a run on more processes; a file cannot take a folder's place in one step
                target.rename(aside(target))
        shutil.rmtree(aside(target), ignore_errors=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read onto the CPU, shards too; no code is run from the file, URLs included.

        Raises:
            CheckpointError: a local file is missing, damaged, foreign, or would run code.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path)


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """AtomicCheckpointIO that copies the state to main memory and writes it while training goes on.

    Up to two copies wait for the disk. A write that failed is raised at the next checkpoint or at the end. Lightning's
    AsyncCheckpointIO copies on the GPU, lets any number of copies wait, and removes the old checkpoint before the new
    one is written, so that a kill can leave none.
    """

    def __init__(self) -> None:
        self._queue = WriteQueue()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Copy now, write later."""
        self._queue.settle(left=1)
        snapshot = apply_to_collection(checkpoint, Tensor, _copied)
        self._queue.add(super().save_checkpoint, snapshot, path, storage_options)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read what may only just have been saved."""
        self.finish()
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove it when what was saved before is on the disk."""
        self._queue.add(super().remove_checkpoint, path)

    def finish(self) -> None:
        """Wait until all that was saved is on the disk."""
        self._queue.settle()

    def teardown(self) -> None:
        """Finish."""
        self._queue.close()


def finish_checkpoints(trainer: Trainer) -> None:
    """Wait until all that the trainer has saved is on the disk; call it on every rank."""
    strategy: Any = trainer.strategy
    if hasattr(strategy, "finish_checkpoints"):
        strategy.finish_checkpoints()
    elif isinstance(strategy.checkpoint_io, BackgroundCheckpointIO):
        strategy.checkpoint_io.finish()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
