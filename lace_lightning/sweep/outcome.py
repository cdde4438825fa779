"""What a trial measured: numbers per problem, as they are kept in the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lace_lightning.evaluation.store import read_outcomes, read_settings
from lace_lightning.sweep.spec import SweepError, SweepSpec

OUTCOMES = "outcomes"
"""Folder of ``lace eval`` inside that of a trial's evaluation."""

Outcome = dict[str, Any]
"""``{method: {"problems": [id, …], "values": {statistic: [number, …]}}}`` of one row with one seed."""


def measure(sweep: SweepSpec, folder: Path) -> Outcome:
    """The numbers of an evaluation's folder, on the sweep's benchmark; methods in the order of the evaluation.

    Raises:
        SweepError: the evaluation holds no outcome of it.
    """
    names = statistics_of(sweep)
    display = read_settings(folder / OUTCOMES)["display"]
    benchmark = sweep.benchmark or display["benchmarks"][0]
    found: Outcome = {method: {"problems": [], "values": {name: [] for name in names}} for method in display["methods"]}
    for record in read_outcomes(folder / OUTCOMES):  # in the order of their policies, not of the methods
        if record.benchmark == benchmark:
            own = found[record.method]
            own["problems"].append(record.problem.id)
            for name in names:
                number = record.statistics.get(name)
                own["values"][name].append(None if number is None else round(float(number), 6))
    found = {method: own for method, own in found.items() if own["problems"]}
    if not found:
        raise SweepError(f"{folder} holds no outcome of benchmark {benchmark!r}")
    return found


def statistics_of(sweep: SweepSpec) -> list[str]:
    """What is kept of each outcome."""
    return list(dict.fromkeys([sweep.metric, *sweep.columns, "tokens", "seconds"]))


def value_of(sweep: SweepSpec, outcomes: Sequence[Outcome]) -> float:
    """The metric of the sweep's method, as mean over seeds of the mean over problems.

    Raises:
        SweepError: there is no such method, or no problem has a number.
    """
    return float(np.mean([_mean(sweep, outcome) for outcome in outcomes]))


def array(measured: Mapping[str, Any], name: str) -> np.ndarray:
    """(P,) numbers of one statistic, nan where a problem has none."""
    values = measured["values"].get(name)
    if values is None:
        return np.full(len(measured["problems"]), np.nan)
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _mean(sweep: SweepSpec, outcome: Outcome) -> float:
    method = next(iter(outcome)) if sweep.method is None else sweep.method
    if method not in outcome:
        raise SweepError(f"method={method!r} is none of those that were evaluated: {', '.join(outcome)}")
    numbers = array(outcome[method], sweep.metric)
    if not np.isfinite(numbers).any():
        raise SweepError(f"metric={sweep.metric!r} has no number on any problem for method {method!r}: choose another")
    return float(np.nanmean(numbers))
