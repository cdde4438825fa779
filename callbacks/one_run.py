"""One run per folder: a second one that would write the same checkpoints, or resume the same run, is refused."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lace_lightning.folder_lock import FolderBusyError, FolderLock
from lace_lightning.shards import remove_unfinished
from lace_lightning.tracking.run_folder import checkpoint_folder

UNFINISHED = ".*.ckpt.*.part"
"""Checkpoints that :func:`~lace_lightning.whole_file.whole_file` was writing when the process was killed."""
_ANOTHER_FOLDER = "give this run a folder of its own (dirpath of its checkpoints, or trainer.default_root_dir)"
_ANOTHER_START = "start a new run from its weights: model.init_from instead of --ckpt_path"


class OneRun(Callback):
    """While a model is fitted, holds the folder of its checkpoints, and that of the checkpoint it is resumed from.

    Rank zero holds them; all ranks fail if it cannot. Other commands only read checkpoints, which appear whole, and
    hold nothing; nor does ``fast_dev_run``, which writes none. What killed runs left of checkpoints is removed.
    """

    def __init__(self) -> None:
        self._locks: dict[Path, FolderLock] = {}

    @rank_zero_only
    def hold_known(self, trainer: Trainer, ckpt_path: str | Path | None) -> None:
        """Hold what can be told before anything has begun: a folder given by name, and that of ``ckpt_path``.

        Raises:
            FolderBusyError: another process works there.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        given = getattr(trainer.checkpoint_callback, "dirpath", None)
        if given is not None:
            self._hold(Path(given), _ANOTHER_FOLDER)
        if ckpt_path is not None and Path(ckpt_path).exists():
            self._hold(Path(ckpt_path).parent, _ANOTHER_START)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hold the folder of the checkpoints, before anything is written there.

        Raises:
            FolderBusyError: another process works there.
        """
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder, problem = checkpoint_folder(trainer), ""
        if trainer.is_global_zero:
            try:
                self._hold(folder, _ANOTHER_FOLDER)
            except FolderBusyError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise FolderBusyError(problem)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go."""
        self._release()

    def _hold(self, folder: Path, remedy: str) -> None:
        folder = folder.absolute()
        if folder in self._locks or ":/" in str(folder):  # an address (s3://…) is no folder of a file system
            return
        try:
            self._locks[folder] = FolderLock(folder, remedy)
        except FolderBusyError:
            self._release()
            raise
        if self._locks[folder].is_held:
            for left in folder.glob(UNFINISHED):
                left.unlink(missing_ok=True)
            for checkpoint in folder.glob("*.ckpt/"):
                remove_unfinished(checkpoint)

    def _release(self) -> None:
        while self._locks:
            self._locks.popitem()[1].release()
