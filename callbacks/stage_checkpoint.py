"""ModelCheckpoint that does not forget the end."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lace_lightning.checkpoint_io import finish_checkpoints


class StageCheckpoint(ModelCheckpoint):
    """ModelCheckpoint, with the same arguments, that also saves the state after the last step.

    Lightning's own leaves it out if ``every_n_train_steps`` does not divide the number of steps: the next stage would
    start from weights that miss the end of this one. A run that ``max_steps`` ended can be resumed with more steps.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save when due, and when ``max_steps`` is reached: later Lightning takes the epoch for finished."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if 0 <= trainer.max_steps <= trainer.global_step:
            self._save_unless_saved(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if epochs, time or another callback ended the run; then all checkpoints are on the disk."""
        self._save_unless_saved(trainer)
        finish_checkpoints(trainer)

    def _save_unless_saved(self, trainer: Trainer) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)
