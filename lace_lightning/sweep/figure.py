"""The figure of a sweep: bars, lines along a number, or a heat map over two axes; drawn without pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lace_lightning.sweep.points import spelled
from lace_lightning.sweep.report import axis_names
from lace_lightning.sweep.table import Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(result: Result) -> Figure:
    """The figure that fits the rows, of which there is at least one."""
    from matplotlib.figure import Figure

    rows, axes_varied = result.rows, axis_names(result.rows)
    kind = kind_of(rows)
    drawn = Figure(figsize=(7, 1.5 + 0.4 * len(rows)) if kind == "bars" else (7, 4.5), layout="constrained")
    axes = drawn.subplots()
    if kind == "lines":
        _lines(axes, rows, axes_varied[0])
    elif kind == "heat map":
        image = _heat_map(axes, rows, axes_varied[0], axes_varied[1])
        drawn.colorbar(image, ax=axes, label=result.sweep.metric)
    else:
        _bars(axes, rows)
    if kind == "lines":
        axes.set_ylabel(result.sweep.metric)
    elif kind == "bars":
        axes.set_xlabel(result.sweep.metric)
    axes.set_title(_plain(result.sweep.name))
    return drawn


def kind_of(rows: Sequence[Row]) -> str:
    """``lines`` along one axis of numbers, ``heat map`` over a full grid of two axes, else ``bars``."""
    names = axis_names(rows)
    if len(names) == 1 and all(_is_number(row.measured.values[names[0]]) for row in rows):
        return "lines"
    methods = {row.measured.method for row in rows}
    if len(names) == 2 and len(methods) == 1:
        counts = [len({spelled(row.measured.values[name]) for row in rows}) for name in names]
        if counts[0] * counts[1] == len(rows):
            return "heat map"
    return "bars"


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    places = np.arange(len(rows))[::-1]
    axes.barh(places, [row.metric.value for row in rows], color="#4878a8", height=0.6)
    axes.errorbar(
        [row.metric.value for row in rows], places, xerr=_whiskers(rows), fmt="none", ecolor="black", capsize=3
    )
    axes.set_yticks(places, [_plain(row.measured.label) for row in rows])


def _lines(axes: Axes, rows: Sequence[Row], axis: str) -> None:
    for method in dict.fromkeys(row.measured.method for row in rows):
        own = sorted((row for row in rows if row.measured.method == method), key=lambda row: row.measured.values[axis])
        x = [row.measured.values[axis] for row in own]
        axes.errorbar(
            x, [row.metric.value for row in own], yerr=_whiskers(own), marker="o", capsize=3, label=_plain(method)
        )
    axes.set_xlabel(_plain(axis))
    axes.legend()


def _heat_map(axes: Axes, rows: Sequence[Row], down: str, across: str):  # type: ignore[no-untyped-def]
    names = [list(dict.fromkeys(spelled(row.measured.values[axis]) for row in rows)) for axis in (down, across)]
    values = np.full([len(one) for one in names], np.nan)
    for row in rows:
        place = [own.index(spelled(row.measured.values[axis])) for own, axis in zip(names, (down, across), strict=True)]
        values[place[0], place[1]] = row.metric.value
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(names[0])), [*map(_plain, names[0])])
    axes.set_xticks(range(len(names[1])), [*map(_plain, names[1])])
    axes.set(xlabel=_plain(across), ylabel=_plain(down))
    middle = (np.nanmax(values) + np.nanmin(values)) / 2
    for (row_index, column), value in np.ndenumerate(values):
        colour = "black" if value > middle else "white"
        axes.text(column, row_index, f"{value:.3f}", ha="center", va="center", color=colour)
    return image


def _whiskers(rows: Sequence[Row]) -> np.ndarray:
    """(2, R) lengths below and above; 0 where there is no interval."""
    lengths = [[row.metric.value - row.metric.low, row.metric.high - row.metric.value] for row in rows]
    return np.nan_to_num(np.array(lengths).T).clip(min=0)


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
