"""The rows of a sweep: labelled settings, from a list, a grid, random draws or Optuna."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import exp, log
from typing import TYPE_CHECKING, Any

from lace_lightning.sweep.spec import Axis, Change, SweepError, SweepSpec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Point:
    """One row before it is run.

    Args:
        label: its name in tables.
        changes: what it does to the base, in order.
        values: value or choice by axis.
    """

    label: str
    changes: tuple[Change, ...]
    values: Mapping[str, Any]


def planned_points(sweep: SweepSpec) -> list[Point]:
    """All rows that are known beforehand: none of ``tpe``.

    Raises:
        SweepError: two rows have the same label.
    """
    points = [*_planned(sweep)]
    labels = [point.label for point in points]
    if sweep.search != "random" and len(set(labels)) != len(labels):
        raise SweepError(f"two rows are called {max(labels, key=labels.count)!r}: give the values of an axis once")
    if sweep.base is not None and sweep.search != "tpe" and sweep.base not in labels:
        raise SweepError(f"base={sweep.base!r} is none of the rows {', '.join(labels)}")
    return list({point.label: point for point in points}.values())


def _planned(sweep: SweepSpec) -> Iterator[Point]:
    if sweep.search == "list":
        for label, change in sweep.rows.items():
            yield Point(label, (change,), {"row": label})
    elif sweep.search == "grid":
        options = [axis.choices or axis.values for axis in sweep.axes.values()]
        for values in product(*options):
            yield point_of(sweep, dict(zip(sweep.axes, values, strict=True)))
    elif sweep.search == "random":
        generator = random.Random(sweep.search_seed)
        for _ in range(sweep.limits.trials):
            yield point_of(sweep, {name: _draw(axis, generator) for name, axis in sweep.axes.items()})


def point_of(sweep: SweepSpec, values: Mapping[str, Any]) -> Point:
    """The row with these values (or names of choices) by axis."""
    changes = tuple(_change(axis, values[name]) for name, axis in sweep.axes.items())
    label = ", ".join(f"{name}={spelled(values[name])}" for name in sweep.axes)
    return Point(label, changes, dict(values))


def distributions(sweep: SweepSpec) -> dict[str, BaseDistribution]:
    """The axes in Optuna's words."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def of(axis: Axis) -> BaseDistribution:
        if axis.range is None:
            return CategoricalDistribution([*axis.choices] or [spelled(value) for value in axis.values])
        low, high = axis.range
        if axis.integer:
            return IntDistribution(int(low), int(high), log=axis.log)
        return FloatDistribution(low, high, log=axis.log)

    return {name: of(axis) for name, axis in sweep.axes.items()}


def suggested(sweep: SweepSpec, params: Mapping[str, Any]) -> Point:
    """The row of what Optuna suggested."""
    named = {
        name: {spelled(value): value for value in axis.values} if axis.values else {}
        for name, axis in sweep.axes.items()
    }
    return point_of(sweep, {name: named[name].get(value, value) for name, value in params.items()})


def spelled(value: Any) -> str:
    """A value in a label: numbers short, lists without blanks."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)


def _change(axis: Axis, value: Any) -> Change:
    if axis.choices:
        return axis.choices[value]
    keys = [axis.key] if isinstance(axis.key, str) else axis.key or []
    return Change(set={key: value for key in keys})


def _draw(axis: Axis, generator: random.Random) -> Any:
    if axis.range is None:
        return generator.choice([*axis.choices] or axis.values)
    low, high = axis.range
    half = 0.5 if axis.integer else 0.0  # rounding takes as much to the ends as to what lies between them
    first, last = low - half, high + half
    drawn = exp(generator.uniform(log(first), log(last))) if axis.log else generator.uniform(first, last)
    return int(min(max(round(drawn), low), high)) if axis.integer else drawn
