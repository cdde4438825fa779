"""The table of a sweep: means with intervals over seeds, and paired differences to the base row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from lace_lightning.evaluation.statistics import Estimate, estimate, mean_estimate, resampled
from lace_lightning.sweep.outcome import Outcome, array
from lace_lightning.sweep.spec import SweepSpec

RESAMPLES = 2000
_FLIPS, _AT_ONCE = 10_000, 500


@dataclass(frozen=True)
class Measured:
    """A row of results before it is compared.

    Args:
        point: label of the row in the sweep.
        label: of the row in the table, with its method where there are several.
        values: value or choice by axis.
        method: of ``lace eval``.
        by_seed: numbers per problem (:data:`~lace_lightning.sweep.outcome.Outcome`) by seed.
    """

    point: str
    label: str
    values: Mapping[str, Any]
    method: str
    by_seed: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        measured: what it is of.
        metric: mean over seeds with its 95 % interval: Student's t over seeds, with one seed a bootstrap over problems.
        difference: to the base row, paired by seed and problem, with the interval of a bootstrap over both; None for
            the base itself, nan where the base has no result.
        p_value: two-sided sign-flip test of the paired differences per problem.
        columns: means of further statistics.
    """

    measured: Measured
    metric: Estimate
    difference: Estimate | None
    p_value: float
    columns: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """A whole table.

    Args:
        sweep: what was run.
        rows: in the order of the plan.
        failures: what failed: label and reason.
        num_open: trials that have not ended.
    """

    sweep: SweepSpec
    rows: Sequence[Row]
    failures: Sequence[tuple[str, str]]
    num_open: int


def measured_rows(
    labels: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, Mapping[int, Outcome]]
) -> list[Measured]:
    """One row per label and method.

    Args:
        labels: values by axis, by label, in the order of the table.
        outcomes: by label and seed.
    """
    found = []
    for label, values in labels.items():
        by_seed = outcomes.get(label, {})
        methods = list(dict.fromkeys(method for outcome in by_seed.values() for method in outcome))
        for method in methods:
            name = label if len(methods) == 1 else method if len(labels) == 1 else f"{label}: {method}"
            own = {seed: outcome[method] for seed, outcome in sorted(by_seed.items()) if method in outcome}
            found.append(Measured(label, name, values, method, own))
    return found


def compare(sweep: SweepSpec, measured: Sequence[Measured], base: str | None = None) -> list[Row]:
    """Each row beside the base: the first one with that label (any, if it is None) and ``sweep.method``."""
    candidates = [row for row in measured if sweep.method in (None, row.method) and base in (None, row.point)]
    return [_row(sweep, row, candidates[0] if candidates else None) for row in measured]


def _row(sweep: SweepSpec, measured: Measured, base: Measured | None) -> Row:
    columns = {name: _mean(measured, name) for name in sweep.columns}
    metric = over_seeds([array(own, sweep.metric) for own in measured.by_seed.values()])
    if measured is base:
        return Row(measured, metric, None, math.nan, columns)
    gaps = np.zeros((0, 0)) if base is None else paired(measured, base, sweep.metric)
    return Row(measured, metric, crossed(gaps), sign_flip(gaps.mean(0)) if gaps.size else math.nan, columns)


def over_seeds(values: Sequence[np.ndarray]) -> Estimate:
    """Mean and 95 % interval of (P,) numbers per seed; nan where a problem has none. Seeds without any do not count."""
    known = [one for one in values if np.isfinite(one).any()]
    if not known:
        return Estimate(math.nan, math.nan, math.nan)
    if len(known) == 1:
        return mean_estimate(known[0])
    means = np.array([np.nanmean(one) for one in known])
    half = float(stdtrit(len(means) - 1, 0.975)) * means.std(ddof=1) / math.sqrt(len(means))
    return Estimate(float(means.mean()), float(means.mean() - half), float(means.mean() + half))


def paired(row: Measured, base: Measured, metric: str) -> np.ndarray:
    """(S, P) differences over the seeds and problems that both have; seeds without a number are left out."""
    seeds = [seed for seed in row.by_seed if seed in base.by_seed]
    pairs = [(_finite(row.by_seed[seed], metric), _finite(base.by_seed[seed], metric)) for seed in seeds]
    pairs = [(ours, theirs) for ours, theirs in pairs if ours.keys() & theirs.keys()]
    if not pairs:
        return np.zeros((0, 0))
    problems = [problem for problem in pairs[0][0] if all(problem in side for pair in pairs for side in pair)]
    return np.array([[ours[problem] - theirs[problem] for problem in problems] for ours, theirs in pairs])


def _finite(measured: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The numbers by problem, of those that have one."""
    numbers = zip(measured["problems"], array(measured, metric).tolist(), strict=True)
    return {problem: number for problem, number in numbers if math.isfinite(number)}


def crossed(gaps: np.ndarray) -> Estimate:
    """Mean of (S, P) differences, with the interval of a bootstrap that draws seeds and problems, each by itself."""
    if not gaps.size:
        return Estimate(math.nan, math.nan, math.nan)
    seeds, problems = (resampled(size, RESAMPLES, seed) / size for seed, size in enumerate(gaps.shape))
    draws = np.einsum("rs,sp,rp->r", seeds, gaps, problems, optimize=True)
    return estimate(float(gaps.mean()), draws)


def sign_flip(gaps: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of (P,) paired differences: how often random signs give a sum as far from 0."""
    gaps = gaps[gaps != 0]
    generator, reached = np.random.default_rng(seed), abs(gaps.sum()) - 1e-9
    hits = 0
    for _ in range(_FLIPS // _AT_ONCE):
        signs = generator.integers(0, 2, (_AT_ONCE, len(gaps))) * 2 - 1
        hits += int((np.abs(signs @ gaps) >= reached).sum())
    return (1 + hits) / (1 + _FLIPS)


def _mean(measured: Measured, name: str) -> float:
    arrays = [array(own, name) for own in measured.by_seed.values()]
    finite = [values[np.isfinite(values)] for values in arrays]
    means = [float(values.mean()) for values in finite if len(values)]
    return sum(means) / len(means) if means else math.nan
