"""Where a training step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """Shares of a step's wall-clock time; waits for the device, so that its work is counted where it belongs."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._seconds[name] = self._now() - start

    def shares(self) -> dict[str, float]:
        total = sum(self._seconds.values())
        return {name: seconds / total for name, seconds in self._seconds.items()}

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
