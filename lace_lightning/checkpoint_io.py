"""Checkpoint files that are whole or absent, whatever kills the process that writes them, and are checked when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lace_lightning.checkpoints import read_checkpoint
from lace_lightning.whole_file import whole_file


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
        with whole_file(target) as unfinished, unfinished.open("wb") as stream:
            torch.save(checkpoint, stream)  # given a path, it would not say that the disk is full

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read onto the CPU; no code is run from the file, URLs included.

        Raises:
            CheckpointError: a local file is missing, damaged, foreign, or would run code.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path)
