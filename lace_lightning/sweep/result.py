"""From a study to the table, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from lace_lightning.sweep.figure import figure
from lace_lightning.sweep.outcome import Outcome
from lace_lightning.sweep.points import planned_points, suggested
from lace_lightning.sweep.report import as_csv, markdown
from lace_lightning.sweep.spec import SweepSpec
from lace_lightning.sweep.study import ERROR, LABEL, OUTCOME, SEEDS, Ledger
from lace_lightning.sweep.table import Result, compare, measured_rows
from lace_lightning.sweep.units import Unit
from lace_lightning.whole_file import write_text


def result_of(sweep: SweepSpec, ledger: Ledger, units: Sequence[Unit]) -> Result:
    """The table of what has finished; trials of former plans are left out.

    Args:
        sweep: the sweep.
        ledger: its study.
        units: the plan; empty for ``tpe``, whose plan is what Optuna suggested.
    """
    states = ledger.states()
    if sweep.search != "tpe":
        labels = {point.label: dict(point.values) for point in planned_points(sweep)}
        found = [(*states[unit.key], unit.label) for unit in units if unit.key in states]
    else:
        found = [(state, trial, trial.user_attrs[LABEL]) for state, trial in states.values()]
        labels = {label: dict(suggested(sweep, trial.params).values) for _, trial, label in found}
    outcomes: dict[str, dict[int, Outcome]] = {}
    for state, trial, label in found:
        if state == "finished":
            outcomes.setdefault(label, {}).update({int(seed): own for seed, own in trial.user_attrs[OUTCOME].items()})
    failures = [
        (f"{label}, seed {', '.join(map(str, trial.user_attrs[SEEDS]))}", trial.user_attrs[ERROR])
        for state, trial, label in found
        if state == "failed"
    ]
    planned = len(units) if sweep.search != "tpe" else sweep.limits.trials
    num_open = planned - sum(state in ("finished", "failed") for state, _, _ in found)
    base = next(iter(labels), None) if sweep.base is None and sweep.search != "tpe" else sweep.base
    rows = compare(sweep, measured_rows(_without_empty(labels, outcomes), outcomes), base)
    return Result(sweep, rows, failures, max(0, num_open))


def _without_empty(
    labels: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, object]
) -> dict[str, Mapping[str, Any]]:
    return {label: values for label, values in labels.items() if label in outcomes}


def write(result: Result, folder: Path) -> None:
    """``report.md``, ``report.csv``, ``report.json``, and where there are rows ``report.png``."""
    write_text(folder / "report.md", markdown(result))
    write_text(folder / "report.csv", as_csv(result))
    means = {row.measured.label: row.metric.value if isfinite(row.metric.value) else None for row in result.rows}
    summary = {"sweep": result.sweep.name, "metric": result.sweep.metric, "means": means, "open": result.num_open}
    write_text(folder / "report.json", json.dumps(summary | {"failures": result.failures}, indent=2) + "\n")
    if result.rows:
        figure(result).savefig(folder / "report.png", dpi=150)
