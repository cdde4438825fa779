"""Summaries as tables, for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lace_lightning.evaluation.comparison import AtEqualCost
from lace_lightning.evaluation.statistics import Estimate
from lace_lightning.evaluation.summary import BenchmarkSummary

if TYPE_CHECKING:
    from rich.table import Table

SHARES = {
    "best_at_n": "best@n",
    "mean_at_n": "mean@n",
    "vote_at_n": "vote@n",
    "fmt": "fmt",
    "unparsable": "unparsable",
    "expl": "expl",
    "edit_distance": "edit",
}
"""Columns of the quality sheet, by statistic."""
COSTS = {"tokens": "tokens", "prompt_tokens": "prompt", "columns": "columns", "seconds": "seconds"}


@dataclass(frozen=True)
class Sheet:
    """A table of text; the first column is left-aligned, the others right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """The sheet as Markdown, under a heading."""
        head = ["| " + " | ".join(self.columns) + " |", "|" + " --- |" + " ---: |" * (len(self.columns) - 1)]
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join([f"### {self.title}", "", *head, *rows, *(["", self.note] if self.note else [])])

    def table(self) -> Table:
        """The sheet for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=self.title,
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            caption=self.note or None,
            title_justify="left",
            caption_justify="left",
        )
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


def sheets(summaries: Sequence[BenchmarkSummary], for_terminal: bool = False) -> list[Sheet]:
    """All sheets of all benchmarks but those without rows; for the terminal without the reliability tables."""
    made = (
        sheet
        for summary in summaries
        for sheet in (
            _quality(summary),
            _cost(summary),
            _differences(summary),
            _equal_cost(summary),
            _shared_errors(summary),
            _calibration(summary),
            *([] if for_terminal else [_reliability(summary)]),
        )
    )
    return [sheet for sheet in made if sheet.rows]


def markdown(summaries: Sequence[BenchmarkSummary]) -> str:
    """A page with all sheets."""
    return "\n\n".join(sheet.markdown() for sheet in sheets(summaries)) + "\n"


def _quality(summary: BenchmarkSummary) -> Sheet:
    return Sheet(
        f"{summary.benchmark}: quality",
        ["method", "acc", *SHARES.values()],
        [
            [method.method, _share(method.statistics["acc"])]
            + [_percent(method.statistics[name].value) for name in SHARES]
            for method in summary.methods
        ],
        "Percent (expl and edit too), mean over problems of the mean over seeds, with the 95 % bootstrap interval over "
        "problems; summary.json has all intervals. Failed outcomes count in no mean.",
    )


def _cost(summary: BenchmarkSummary) -> Sheet:
    return Sheet(
        f"{summary.benchmark}: cost per problem",
        ["method", *COSTS.values(), "right", "missed", "not found", "problems", "failed"],
        [
            [method.method]
            + [_number(method.statistics[name].value) for name in COSTS]
            + [_percent(method.found.get(how, 0.0)) for how in ("chosen right", "found but not chosen", "not found")]
            + [str(method.num_problems), str(method.num_failures)]
            for method in summary.methods
        ],
        "prompt: tokens read. columns: decoding steps one after the other. seconds: of a batch, each problem's even "
        "share. right, missed (some path was right and not chosen), not found: percent of outcomes.",
    )


def _differences(summary: BenchmarkSummary) -> Sheet:
    return Sheet(
        f"{summary.benchmark}: {summary.reference} minus others",
        ["method", "acc difference", "problems"],
        [[one.method, _share(one.difference, sign=True), str(one.num_problems)] for one in summary.differences],
        "Points of accuracy whatever the cost; paired by problem, over problems that both finished.",
    )


def _equal_cost(summary: BenchmarkSummary) -> Sheet:
    return Sheet(
        f"{summary.benchmark}: {summary.reference} minus others at equal cost",
        ["method", "equal", "acc difference", "how", "nearest cost", "problems"],
        [
            [one.family, one.cost, _share(one.difference, sign=True), _how(one), _ratio(one), str(one.num_problems)]
            for one in summary.at_equal_cost
        ],
        "A family is a method at several budgets (name@budget); its accuracy is read off the line between its points "
        "at the reference's cost, never beyond them. Nearest cost: of its nearest point, over that of the reference.",
    )


def _how(one: AtEqualCost) -> str:
    return {"too cheap": "none: all points cheaper", "too dear": "none: all points dearer"}.get(one.how, one.how)


def _ratio(one: AtEqualCost) -> str:
    return f"{one.ratio:.2f}×" if math.isfinite(one.ratio) else "–"


def _shared_errors(summary: BenchmarkSummary) -> Sheet:
    rows = []
    for method in summary.methods:
        if (shared := method.shared_errors) is not None:
            parts = (shared.all_wrong, shared.all_same_wrong, shared.together, shared.apart)
            shares = [_percent(part.value) for part in parts] + [_share(shared.excess, sign=True)]
            rows.append([method.method, *shares, str(shared.num_threads)])
    return Sheet(
        f"{summary.benchmark}: shared errors",
        ["method", "all wrong", "all same wrong", "K together", "K apart", "excess", "K"],
        rows,
        "K together, apart: chance that K paths of one outcome, or of K seeds, give the same wrong answer. Independent "
        "threads have excess 0; one seed has no apart.",
    )


def _calibration(summary: BenchmarkSummary) -> Sheet:
    found = [(method.method, method.calibration) for method in summary.methods if method.calibration]
    return Sheet(
        f"{summary.benchmark}: confidence against correctness",
        ["method", "outcomes", "ECE", "AUROC"],
        [[name, str(one.num_outcomes), _number(one.ece, 3), _number(one.auroc, 3)] for name, one in found],
    )


def _reliability(summary: BenchmarkSummary) -> Sheet:
    rows = [
        [method.method, f"{part.low:.1f}–{part.high:.1f}", str(part.num_outcomes)]
        + [_percent(part.confidence), _percent(part.acc)]
        for method in summary.methods
        if method.calibration
        for part in method.calibration.bins
    ]
    return Sheet(
        f"{summary.benchmark}: reliability", ["method", "confidence in", "outcomes", "mean confidence", "acc"], rows
    )


def _share(part: Estimate, sign: bool = False) -> str:
    """A share in percent with its interval."""
    if not math.isfinite(part.value):
        return "–"
    form = "+.1f" if sign else ".1f"
    value = format(100 * part.value, form)
    if not math.isfinite(part.low):
        return value
    return f"{value} ({format(100 * part.low, form)} … {format(100 * part.high, form)})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "–"


def _number(value: float, decimals: int | None = None) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.{decimals}f}" if decimals is not None else f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
