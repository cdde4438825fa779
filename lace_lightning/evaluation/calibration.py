"""Whether a method's confidence in its answer says how often it is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchmetrics.functional.classification import binary_auroc

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Outcomes whose confidence lies above ``low`` (or at 0) and at most at ``high``."""

    low: float
    high: float
    num_outcomes: int
    confidence: float
    acc: float


@dataclass(frozen=True)
class Calibration:
    """Confidence against correctness over outcomes.

    Args:
        num_outcomes: outcomes that have a confidence.
        ece: expected calibration error: mean distance of confidence and accuracy over the bins, weighted by outcomes.
        auroc: chance that a right outcome has the higher confidence of it and a wrong one, ties counting half; nan
            where all are right or all wrong.
        bins: the reliability table, without empty bins.
    """

    num_outcomes: int
    ece: float
    auroc: float
    bins: tuple[Bin, ...]


def calibrate(confidences: Sequence[float], is_right: Sequence[bool], num_bins: int = NUM_BINS) -> Calibration | None:
    """The calibration of outcomes; None if there are none.

    Raises:
        ValueError: a confidence is not between 0 and 1.
    """
    if not confidences:
        return None
    if bad := [value for value in confidences if not 0 <= value <= 1]:
        raise ValueError(f"confidence {bad[0]}: must lie between 0 and 1")
    scores, right = torch.tensor(confidences, dtype=torch.float64), torch.tensor(is_right).long()
    is_mixed = 0 < int(right.sum()) < len(right)
    bins = _bins(scores, right, num_bins)
    ece = sum(part.num_outcomes * abs(part.confidence - part.acc) for part in bins) / len(right)
    auroc = float(binary_auroc(scores, right)) if is_mixed else math.nan
    return Calibration(len(right), ece, auroc, tuple(bins))


def _bins(scores: torch.Tensor, right: torch.Tensor, num_bins: int) -> list[Bin]:
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    which = (torch.bucketize(scores, edges) - 1).clamp(0, num_bins - 1)
    found = []
    for index in which.unique().tolist():
        inside = which == index
        confidence, acc = float(scores[inside].mean()), float(right[inside].double().mean())
        found.append(Bin(float(edges[index]), float(edges[index + 1]), int(inside.sum()), confidence, acc))
    return found
