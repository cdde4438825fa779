"""Watching how different the threads of training rollouts are."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lace_lightning.callbacks.reporting import (
    check_interval,
    current_step,
    is_due,
    mlflow_loggers,
    sampled_in,
    threaded,
)
from lace_lightning.diversity import edit_diversity, embedding_diversity, thread_similarity
from lace_lightning.embedding import Embedder
from lace_lightning.figures import similarity_figure


class DiversityMonitor(Callback):
    """Logs ``diversity/embedding`` and ``diversity/edit`` of training rollouts; validation has ``val/expl`` for it.

    Of the first batch of each validation it draws ``diversity/threads``: how alike the thoughts of threads n and m are.

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
        embedder = self._embedder(pl_module)
        embedding = embedding_diversity(sampled.groups, embedder).sum()
        edit = sum(map(edit_diversity, sampled.groups))
        sums = torch.tensor([float(embedding), edit, len(sampled.groups)], device=pl_module.device)
        totals = trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(totals, torch.Tensor)
        metrics = {"diversity/embedding": float(totals[0] / totals[2]), "diversity/edit": float(totals[1] / totals[2])}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=current_step(trainer))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Draw the first batch's similarities."""
        sampled = sampled_in(outputs)
        if sampled is None or batch_idx > 0 or trainer.sanity_checking or not mlflow_loggers(trainer):
            return
        figure = similarity_figure(thread_similarity(sampled.groups, self._embedder(pl_module)))
        for logger in mlflow_loggers(trainer):
            logger.log_image("diversity/threads", figure, current_step(trainer))

    def _embedder(self, pl_module: LightningModule) -> Embedder:
        return self.embedder or threaded(pl_module).evaluation_metrics("val")[0].embedder
