"""The outcome of one evaluation: means with their intervals, and what isolated threads could reach at most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class EvaluationSummary:
    """Numbers of one evaluation.

    Args:
        metrics: mean of each statistic over the groups.
        intervals: 95 % bootstrap interval of those that have one.
        num_groups: groups evaluated, over all processes.
        ceiling: highest ``best_at_n`` that threads which cannot read each other reach on these problems, if every
            problem's is known.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    num_groups: int
    ceiling: float | None

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values; null stands for numbers that are not finite."""
        return {
            "metrics": {name: _finite(value) for name, value in self.metrics.items()},
            "intervals": {name: [_finite(low), _finite(high)] for name, (low, high) in self.intervals.items()},
            "num_groups": self.num_groups,
            "ceiling": self.ceiling,
        }

    def rows(self) -> list[dict[str, object]]:
        """One row per metric, the ceiling among them: ``metric``, ``value``, ``low``, ``high``, ``num_groups``."""
        values = dict(self.metrics) if self.ceiling is None else self.metrics | {"ceiling": self.ceiling}
        nothing = (math.nan, math.nan)
        bounds = {name: self.intervals.get(name, nothing) for name in values}
        return [
            {
                "metric": name,
                "value": _finite(value),
                "low": _finite(bounds[name][0]),
                "high": _finite(bounds[name][1]),
                "num_groups": self.num_groups,
            }
            for name, value in values.items()
        ]

    def table(self, title: str) -> Table:
        """A table for the terminal."""
        from rich.table import Table

        caption = None if self.ceiling is None else "ceiling: highest best_at_n of isolated threads"
        table = Table("metric", title=title, caption=caption, title_justify="left", caption_justify="left")
        for column in ("value", "95 % interval", "groups"):
            table.add_column(column, justify="right")
        for row in self.rows():
            value, low, high = (_spelled(row[key]) for key in ("value", "low", "high"))
            interval = f"{low} … {high}" if low and high else ""
            table.add_row(str(row["metric"]), value or "–", interval, f"{self.num_groups:,}")
        return table


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spelled(value: object) -> str:
    """Three decimals, one for numbers from 10 on; empty if there is none."""
    if not isinstance(value, float):
        return ""
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
