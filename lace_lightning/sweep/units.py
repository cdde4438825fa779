"""What is handed out to workers, and to whom it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unit:
    """What one Optuna trial stands for.

    Args:
        key: equal for equal work.
        label: of the row.
        seeds: that are run.
    """

    key: str
    label: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Claim:
    """A trial that is ours to run."""

    unit: Unit
    number: int
    trial_id: int
    params: Mapping[str, Any]
