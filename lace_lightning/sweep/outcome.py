"""What a trial measured: numbers per problem, as they are kept in the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lace_lightning.evaluation.store import read_outcomes
from lace_lightning.sweep.spec import SweepError, SweepSpec

Outcome = dict[str, Any]
"""``{method: {"problems": [id, …], "values": {statistic: [number, …]}}}`` of one row with one seed."""


def measure(sweep: SweepSpec, folder: Path) -> Outcome:
    """The numbers of an evaluation's folder, on the sweep's benchmark.

    Raises:
        SweepError: the evaluation holds no outcome of it.
    """
    names = dict.fromkeys([sweep.metric, *sweep.columns, "tokens", "seconds"])
    found: Outcome = {}
    benchmark = sweep.benchmark
    for record in read_outcomes(folder / "outcomes"):
        benchmark = benchmark or record.benchmark
        if record.benchmark == benchmark:
            own = found.setdefault(record.method, {"problems": [], "values": {name: [] for name in names}})
            own["problems"].append(record.problem.id)
            for name in names:
                number = record.statistics.get(name)
                own["values"][name].append(None if number is None else round(float(number), 6))
    if not found:
        raise SweepError(f"{folder} holds no outcome of benchmark {benchmark!r}")
    return found


def value_of(sweep: SweepSpec, outcomes: Sequence[Outcome]) -> float:
    """The metric of the sweep's method, as mean over seeds of the mean over problems."""
    return float(np.mean([np.nanmean(array(_of_method(outcome, sweep.method), sweep.metric)) for outcome in outcomes]))


def array(measured: Mapping[str, Any], name: str) -> np.ndarray:
    """(P,) numbers of one statistic, nan where a problem has none."""
    values = measured["values"].get(name)
    if values is None:
        return np.full(len(measured["problems"]), np.nan)
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _of_method(outcome: Outcome, method: str | None) -> Mapping[str, Any]:
    return outcome[method] if method is not None else next(iter(outcome.values()))
