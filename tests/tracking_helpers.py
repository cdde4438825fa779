"""A tiny model and trainer for tests of tracking and signals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

BATCHES_PER_EPOCH = 4
VALIDATION_BATCHES = 3


class TinyModel(LightningModule):
    """Learns from batches that are all alike, so that a resumed run must reach the same weights bit for bit.

    ``on_step(stage, count)`` is called inside each step with the number of steps of that stage so far.
    """

    def __init__(self, on_step: Callable[[str, int], None] = lambda stage, count: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)
        self.on_step = on_step
        self.counts = {"train": 0, "val": 0}
        self.validations: list[int] = []

    def _step(self, stage: str, batch: torch.Tensor) -> torch.Tensor:
        self.on_step(stage, self.counts[stage])
        self.counts[stage] += 1
        return self.layer(batch).square().mean()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self._step("train", batch)
        self.log("train/loss", loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.validations.append(0)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validations[-1] += 1
        self.log("val/loss", self._step("val", batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([torch.ones(2)] * BATCHES_PER_EPOCH)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([torch.ones(2)] * VALIDATION_BATCHES)


def tiny_trainer(folder: Path, **options: Any) -> Trainer:
    """A silent CPU trainer of two epochs, four batches and three validation batches each."""
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**settings, **options})
