"""ModelCheckpoint that does not forget the end."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class StageCheckpoint(ModelCheckpoint):
    """ModelCheckpoint, with the same arguments, that also saves the state after the last step.

    Lightning's own leaves it out if ``every_n_train_steps`` does not divide the number of steps: the next stage would
    start from weights that miss the end of this one.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the last step is saved already."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)
