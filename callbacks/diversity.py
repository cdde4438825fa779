"""Watching how different the threads of training rollouts are."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lace_lightning.callbacks.reporting import check_interval, current_step, is_due, sampled_in, threaded
from lace_lightning.diversity import edit_diversity, embedding_diversity
from lace_lightning.embedding import Embedder


class DiversityMonitor(Callback):
    """Logs ``diversity/embedding`` and ``diversity/edit`` of training rollouts; validation has ``val/expl`` for it.

    Args:
        every_n_steps: training batches from one report to the next; null: the trainer's ``log_every_n_steps``.
        embedder: embeds thoughts; null: the module's, so that the numbers compare with ``val/expl``.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int | None = None, embedder: Embedder | None = None) -> None:
        self.every_n_steps = check_interval(every_n_steps)
        self.embedder = embedder

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if it is due and the stage samples groups."""
        sampled = sampled_in(outputs)
        if sampled is None or not trainer.loggers or not is_due(trainer, self.every_n_steps):
            return
        embedder = self.embedder or threaded(pl_module).evaluation_metrics("val")[0].embedder
        embedding = embedding_diversity(sampled.groups, embedder).sum()
        edit = sum(map(edit_diversity, sampled.groups))
        sums = torch.tensor([float(embedding), edit, len(sampled.groups)], device=pl_module.device)
        totals = trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(totals, torch.Tensor)
        metrics = {"diversity/embedding": float(totals[0] / totals[2]), "diversity/edit": float(totals[1] / totals[2])}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=current_step(trainer))
