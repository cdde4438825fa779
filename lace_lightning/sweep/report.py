"""A sweep's table for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

from lace_lightning.evaluation.statistics import Estimate
from lace_lightning.sweep.table import Result, Row

if TYPE_CHECKING:
    from rich.table import Table


def markdown(result: Result) -> str:
    """The report: table, how it is to be read, and what failed."""
    header, rows = _header(result), [_cells(result, row) for row in result.rows]
    lines = [f"# {result.sweep.name}", "", result.sweep.description, "", _line(header)]
    lines += ["| --- " + "| ---: " * (len(header) - 1) + "|", *map(_line, rows)]
    lines += ["", *notes(result)]
    return "\n".join(lines) + "\n"


def table(result: Result) -> Table:
    """The same for the terminal."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(result.sweep.name), title_justify="left")
    for index, name in enumerate(_header(result)):
        shown.add_column(Text(name), justify="right" if index else "left")
    for row in result.rows:
        shown.add_row(*map(Text, _cells(result, row)))
    return shown


def notes(result: Result) -> list[str]:
    """How the table is to be read, and what is missing from it."""
    lines = [
        f"Metric: {result.sweep.metric} ({result.sweep.direction}). ±: half of the 95 % interval, Student's t over "
        "seeds; with one seed a bootstrap over problems. Difference: to the base row, paired by seed and problem, with "
        "the 95 % interval of a bootstrap over both. p: sign-flip test over problems, for these weights; not corrected "
        "for the number of rows."
    ]
    if result.num_open:
        lines += ["", f"{result.num_open} trials have not ended: this table is not complete."]
    if result.failures:
        lines += ["", "Failed (`--retry-failed` tries again):", ""]
        lines += [f"- {label}: {_code(reason)}" for label, reason in result.failures]
    return lines


def as_csv(result: Result) -> str:
    """One line per row, all numbers in full, axes as columns of their own."""
    axes = list(dict.fromkeys(axis for row in result.rows for axis in row.measured.values if axis != "row"))
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    numbers = ["mean", "low", "high", "difference", "difference_low", "difference_high", "p_value"]
    writer.writerow(["row", *axes, "method", "seeds", "metric", *numbers, *result.sweep.columns])
    for row in result.rows:
        metric, gap = row.metric, row.difference or Estimate(math.nan, math.nan, math.nan)
        values = [metric.value, metric.low, metric.high, gap.value, gap.low, gap.high, row.p_value]
        values += [row.columns[name] for name in result.sweep.columns]
        own = row.measured
        seeds = " ".join(map(str, own.by_seed))
        named = [own.label, *(own.values.get(axis, "") for axis in axes), own.method, seeds, result.sweep.metric]
        writer.writerow([*named, *("" if math.isnan(value) else f"{value:.6g}" for value in values)])
    return text.getvalue()


def _code(text: str) -> str:
    """One line of Markdown code: what a log says is no markup."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _line(cells: Sequence[str]) -> str:
    """A line of a Markdown table, whatever stands in its cells."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _header(result: Result) -> list[str]:
    return ["row", "seeds", result.sweep.metric, "difference", "p", *result.sweep.columns]


def _cells(result: Result, row: Row) -> list[str]:
    metric, gap = row.metric, row.difference
    half = (metric.high - metric.low) / 2
    spread = "" if math.isnan(half) else f" ± {half:.3f}"
    difference = "base" if gap is None else f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
    if gap is not None and math.isnan(gap.value):
        difference = "–"
    cells = [row.measured.label, str(len(row.measured.by_seed)), f"{metric.value:.3f}{spread}", difference]
    cells.append("" if math.isnan(row.p_value) else f"{row.p_value:.4f}" if row.p_value > 2e-4 else "< 0.0002")
    return cells + [_number(row.columns[name]) for name in result.sweep.columns]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"


def axis_names(rows: Sequence[Row]) -> list[str]:
    """The axes along which rows vary."""
    names = list(dict.fromkeys(name for row in rows for name in row.measured.values))
    return [name for name in names if len({str(row.measured.values.get(name)) for row in rows}) > 1]
