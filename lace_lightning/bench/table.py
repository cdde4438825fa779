"""Cells as rows of text: one definition for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lace_lightning.bench.peers import label

Row = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Headings of a theme's table, and the rows of one cell in it."""

    headings: Row
    rows: Callable[[dict[str, Any]], Iterator[Row]]


def milliseconds(figure: dict[str, Any]) -> str:
    """Median and quartiles: ``1.234 (1.230–1.240)``; large ones with fewer digits."""
    digits = max(0, 3 - len(str(int(figure["median"]))) + 1)
    return "{median:.{d}f} ({q1:.{d}f}–{q3:.{d}f})".format(**figure, d=digits)


def size(count: float | None) -> str:
    """Bytes in powers of ten; a dash where torch does not count them."""
    if count is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def _ratio(cell: dict[str, Any], case: str) -> str:
    return f"{cell['ratios'][case]['median']:.3f}" if case in cell["ratios"] else ""


def _with_errors(
    place: Row, cell: dict[str, Any], width: int, row: Callable[[str, dict[str, Any]], Row]
) -> Iterator[Row]:
    """A row per case; a case that failed says why in its first column and leaves the others empty."""
    for case, record in cell["cases"].items():
        figures = (record["error"], *[""] * (width - 1)) if "error" in record else row(case, record)
        yield (*place, case, *figures)


def _decode(cell: dict[str, Any]) -> Iterator[Row]:
    place = tuple(str(cell[key]) for key in ("threads", "prompt", "lattice_time"))
    for peer, record in cell.get("peers", {}).items():
        figure = milliseconds(record["step_ms"]) if "step_ms" in record else record["error"]
        yield (*place, label(peer), figure, "", "", "", "")

    def row(case: str, record: dict[str, Any]) -> Row:
        return (
            milliseconds(record["step_ms"]),
            _ratio(cell, case),
            f"{record['times_floor']:.2f}",
            milliseconds(record["prefill_ms"]),
            f"{record['tokens_per_second']:,.0f}",
        )

    if "cases" in cell:
        yield from _with_errors(place, cell, 5, row)


def _memory(cell: dict[str, Any]) -> Iterator[Row]:
    def row(case: str, record: dict[str, Any]) -> Row:
        kv = record["kv"]
        cached = kv["prompt_once_bytes"] + kv["own_bytes"]
        parts = (record["peak_bytes"], record["weight_bytes"], cached, kv["lattice_bytes"])
        peak, weights, keys_values, lattice = map(size, parts)
        return peak, _ratio(cell, case), weights, keys_values, lattice

    yield from _with_errors((str(cell["threads"]), str(cell["prompt"])), cell, 5, row)


def _rollout(cell: dict[str, Any]) -> Iterator[Row]:
    def row(case: str, record: dict[str, Any]) -> Row:
        gap = record["logprobs"]
        return (
            f"{record['tokens_per_second']:,.0f}",
            milliseconds(record["step_ms"]),
            _ratio(cell, case),
            f"{record['share_of_limit']:.1%}",
            gap.get("error") or f"{gap['mean']:.1e}, {gap['max']:.1e}",
        )

    place = "{groups} × {threads} × {new_tokens}, prompt {prompt}".format(**cell)
    yield from _with_errors((place,), cell, 5, row)


def _train(cell: dict[str, Any]) -> Iterator[Row]:
    def row(case: str, record: dict[str, Any]) -> Row:
        return (
            milliseconds(record["step_ms"]),
            _ratio(cell, case),
            f"{record['tokens_per_second']:,.0f}",
            f"{record['matrix_share']:.1%}",
            size(record["peak_bytes"]),
        )

    marks = [name for name in ("checkpointing", "compile") if cell[name]]
    place = ", ".join(["{groups} × {threads} × {length}".format(**cell), *marks])
    yield from _with_errors((place,), cell, 5, row)


def _growth(cell: dict[str, Any]) -> Iterator[Row]:
    def row(case: str, record: dict[str, Any]) -> Row:
        if "peak_bytes" in record:
            return "", _ratio(cell, case), "", size(record["peak_bytes"])
        return milliseconds(record["step_ms"]), _ratio(cell, case), f"{record['times_floor']:.2f}", ""

    yield from _with_errors((cell["sweep"], f"{cell['at']:,}"), cell, 4, row)


LAYOUTS: dict[str, Layout] = {
    "decode": Layout(
        ("N", "prompt", "time", "exchange", "ms per step", "on/off", "× floor", "prefill ms", "tokens/s"), _decode
    ),
    "memory": Layout(("N", "prompt", "exchange", "peak", "on/off", "weights", "KV", "lattice KV"), _memory),
    "rollout": Layout(
        ("groups × N × T", "exchange", "tokens/s", "ms per step", "on/off", "of the limit", "|Δ logprob| mean, max"),
        _rollout,
    ),
    "train": Layout(
        ("groups × N × L", "exchange", "ms per step", "on/off", "tokens/s", "of the matrix rate", "peak"), _train
    ),
    "growth": Layout(("sweep", "at", "exchange", "ms per step", "on/off", "× floor", "peak"), _growth),
}
