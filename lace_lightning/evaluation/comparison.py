"""Differences between methods on the same problems: as they are, at equal tokens and at equal seconds.

Everything is paired by problem: only problems that both sides finished count, seeds are averaged inside of a problem,
and the bootstrap draws problems, the same ones for both sides.

Equal cost. Entries of the configuration whose names agree up to the last ``@`` (``vote@4``, ``vote@16``) are points of
one *family*: one method at several budgets. A family's accuracy at the reference's cost is read off the straight line
between its neighbouring points, in mean cost per problem. Nothing is extrapolated: a family without points on both
sides is compared at its nearest point only if that costs the same to within ``TOLERANCE``, and else it is marked as
not comparable. In bootstrap samples, whose mean costs scatter, costs beyond the outermost point take that point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lace_lightning.evaluation.statistics import Estimate, Sample, estimate, resampled

TOLERANCE = 0.02
"""Relative difference of costs that counts as none."""

How = Literal["interpolated", "same cost", "too cheap", "too dear"]
"""``too cheap``: all points of the family cost less than the reference; ``too dear``: all cost more."""


@dataclass(frozen=True)
class AtEqualCost:
    """The reference's accuracy minus a family's at the reference's cost.

    Args:
        family: name of the family.
        cost: ``tokens`` or ``seconds``.
        how: whether it could be compared.
        difference: reference minus family; nan where it could not.
        ratio: cost of the family's nearest point over that of the reference.
        num_problems: how many problems it rests on.
    """

    family: str
    cost: str
    how: How
    difference: Estimate
    ratio: float
    num_problems: int


@dataclass(frozen=True)
class Difference:
    """The reference's accuracy minus a method's, whatever they cost."""

    method: str
    difference: Estimate
    num_problems: int


def family_of(method: str) -> str:
    """``vote`` of ``vote@16``: what a method is without its budget."""
    return method.rpartition("@")[0] or method


def difference(reference: Sample, method: str, sample: Sample, resamples: int = 2000, seed: int = 0) -> Difference:
    """Paired difference of accuracy over the problems that both have."""
    problems = common_problems([reference, sample])
    gaps = reference.at(problems)["acc"] - sample.at(problems)["acc"]
    if not problems:
        return Difference(method, _nothing(), 0)
    draws = resampled(len(problems), resamples, seed) @ gaps / len(gaps)
    return Difference(method, estimate(float(gaps.mean()), draws), len(problems))


def at_equal_cost(
    reference: Sample, family: str, points: Sequence[Sample], cost: str, resamples: int = 2000, seed: int = 0
) -> AtEqualCost:
    """The reference against a family at the reference's mean cost per problem.

    Args:
        reference: the reference.
        family: name of the family.
        points: its samples, at least one, at different budgets, in any order.
        cost: ``tokens`` or ``seconds``.
        resamples: bootstrap samples.
        seed: of the bootstrap.
    """
    problems = common_problems([reference, *points])
    if not problems:
        return AtEqualCost(family, cost, "too cheap", _nothing(), math.nan, 0)
    ours, theirs = reference.at(problems), [point.at(problems) for point in points]
    weights = np.concatenate([np.ones((1, len(problems))), resampled(len(problems), resamples, seed)]) / len(problems)
    budget, acc = weights @ ours[cost], weights @ ours["acc"]  # (1 + R,), the sample itself first
    costs = np.stack([weights @ point[cost] for point in theirs])  # (points, 1 + R)
    accs = np.stack([weights @ point["acc"] for point in theirs])
    nearest = int(np.abs(costs[:, 0] - budget[0]).argmin())
    ratio = float(costs[nearest, 0] / budget[0]) if budget[0] else math.nan
    how = _how(costs[:, 0], float(budget[0]), ratio)
    if how in ("too cheap", "too dear"):
        return AtEqualCost(family, cost, how, _nothing(), ratio, len(problems))
    read = accs[nearest] if how == "same cost" else _interpolated(budget, costs, accs)
    gaps = acc - read
    return AtEqualCost(family, cost, how, estimate(float(gaps[0]), gaps[1:]), ratio, len(problems))


def common_problems(samples: Sequence[Sample]) -> list[str]:
    """Problems that all samples have, in the first one's order."""
    sets = [set(sample.problems) for sample in samples[1:]]
    return [problem for problem in samples[0].problems if all(problem in other for other in sets)]


def families(methods: Mapping[str, Sample]) -> dict[str, list[Sample]]:
    """The points of each family."""
    found: dict[str, list[Sample]] = {}
    for method, sample in methods.items():
        found.setdefault(family_of(method), []).append(sample)
    return found


def _how(costs: np.ndarray, budget: float, ratio: float) -> How:
    if costs.min() <= budget <= costs.max() and len(costs) > 1:
        return "interpolated"
    if abs(ratio - 1) <= TOLERANCE:
        return "same cost"
    return "too cheap" if costs.max() < budget else "too dear"


def _interpolated(budget: np.ndarray, costs: np.ndarray, accs: np.ndarray) -> np.ndarray:
    """(D,) accuracy of each draw at its budget, on the line through its points (points, D)."""
    order = costs.argsort(axis=0)
    costs, accs = np.take_along_axis(costs, order, 0), np.take_along_axis(accs, order, 0)
    columns = zip(budget, costs.T, accs.T, strict=True)
    return np.array([np.interp(at, x, y) for at, x, y in columns])


def _nothing() -> Estimate:
    return Estimate(math.nan, math.nan, math.nan)
