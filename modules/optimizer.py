"""AdamW with warm-up, as every stage uses it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class OptimizerSpec:
    """Settings of the optimizer.

    Args:
        lr: highest learning rate.
        weight_decay: for matrices; vectors (norms, biases) do not decay.
        betas: of Adam.
        warmup_steps: steps of linear warm-up.
        schedule: after warm-up: ``constant``, or ``cosine`` or ``linear`` down to a tenth of ``lr`` at the last step.

    Raises:
        ValueError: an option is out of range.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0) or self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"model.optimizer: lr={self.lr} must be positive, weight_decay={self.weight_decay} and "
                f"warmup_steps={self.warmup_steps} must not be negative"
            )

    def build(self, parameters: Iterable[nn.Parameter], total_steps: float) -> tuple[AdamW, LambdaLR]:
        """Optimizer and scheduler for the parameters that learn."""
        learning = [p for p in parameters if p.requires_grad]
        groups = [
            {"params": [p for p in learning if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = AdamW([g for g in groups if g["params"]], lr=self.lr, betas=self.betas, fused=True)
        # Lightning takes every fused optimizer for one that must not be clipped under mixed precision. Left to unscale
        # by itself it is like any other, and gradients are clipped before it sees them.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, total_steps))

    def factor(self, step: int, total_steps: float) -> float:
        """Learning rate at a step, as a share of ``lr``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant" or math.isinf(total_steps):
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, total_steps - 1 - self.warmup_steps))
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return 0.1 + 0.9 * left
