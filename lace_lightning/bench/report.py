"""Results as the tables of docs/performance.md: what was measured, and which targets were reached."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lace_lightning.bench.peers import label
from lace_lightning.bench.table import LAYOUTS, Row, milliseconds, size

MARKER = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""Where a table stands in a page; what is between the two comments is replaced."""

_FIGURES = {"cases", "ratios", "peers", "exchange_effect"}
"""Keys of a cell that were measured; the others say where."""
_VARIANTS = ("engine", "backend", "width", "layers", "dtype")
_USUAL = {"engine": "auto", "backend": "auto", "width": 128, "layers": None, "dtype": "auto"}
SMALL = "tiny"
"""The shape of the tool's own tests, which no table shows."""


@dataclass(frozen=True)
class Cell:
    """A measured cell with the run that it comes from.

    Args:
        shape: of the model.
        variant: options of the run that differ from the defaults and change what is measured; empty for none.
        values: the cell as the file has it.
        machine: of the run.
    """

    shape: str
    variant: str
    values: dict[str, Any]
    machine: dict[str, Any]


class Results:
    """All cells of a folder's records; where a cell was measured again, the newest one.

    Args:
        records: as :func:`~lace_lightning.bench.record.read_records` returns them, oldest first.
    """

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self.records = [record for record in records if record["shape"] != SMALL]
        self._cells: dict[str, dict[str, Cell]] = {theme: {} for theme in LAYOUTS}
        for record in self.records:
            for values in record["cells"]:
                cell = Cell(record["shape"], variant(record["options"]), values, record["machine"])
                place = {name: value for name, value in values.items() if name not in _FIGURES}
                kinds = sorted(_FIGURES & set(values))
                key = json.dumps([cell.shape, cell.variant, cell.machine["name"], place, kinds], sort_keys=True)
                self._cells[record["theme"]].pop(key, None)  # the newest stands last
                self._cells[record["theme"]][key] = cell

    def cells(self, theme: str, place: Mapping[str, Any] | None = None) -> list[Cell]:
        """Cells of a theme at a place, given by some of its values, ``shape`` or ``variant``; oldest first."""

        def stands(cell: Cell) -> bool:
            known = cell.values | {"shape": cell.shape, "variant": cell.variant}
            return all(known.get(name) == value for name, value in (place or {}).items())

        return [cell for cell in self._cells[theme].values() if stands(cell)]

    def newest(self, theme: str, place: Mapping[str, Any], kind: str = "cases") -> dict[str, Any] | None:
        """Values of the newest cell at a place that has ``kind``, measured with the usual options."""
        found = [cell.values for cell in self.cells(theme, {**place, "variant": ""}) if kind in cell.values]
        return found[-1] if found else None


def variant(options: Mapping[str, Any]) -> str:
    """``width 256, engine plain``: options that change what is measured, where they are not the usual ones."""
    return ", ".join(f"{name} {options[name]}" for name in _VARIANTS if options[name] != _USUAL[name])


def update(page: Path, results: Results, figures: Sequence[Path] = ()) -> list[str]:
    """Rewrite every marked table of the page and the list of its figures; returns the markers' names.

    Raises:
        ValueError: a marker names no table.
    """
    names: list[str] = []
    tables = TABLES | {f"{kind}-figures": _pictures(page, figures, kind) for kind in ("steps", "growth")}

    def replace(found: re.Match[str]) -> str:
        if found[2] not in tables:
            raise ValueError(f"{page}: no table is called {found[2]!r}; there are {', '.join(tables)}")
        names.append(found[2])
        return f"{found[1]}{tables[found[2]](results)}{found[3]}"

    page.write_text(MARKER.sub(replace, page.read_text()))
    return names


def _pictures(page: Path, figures: Sequence[Path], kind: str) -> Callable[[Results], str]:
    """Links to the figures of one kind, by which their names begin."""
    links = [
        f"![{figure.stem}]({figure.relative_to(page.parent).as_posix()})\n"
        for figure in figures
        if figure.name.startswith(kind)
    ]
    return lambda results: "".join(links) or NOTHING


# ---------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """One target of the speed issue.

    Args:
        number: in the issue's list.
        text: what is asked.
        bound: the figure to reach.
        find: results -> label -> figure, for each figure that must reach it; empty while it is not measured.
        at_most: figures must not exceed the bound; else they must not fall below it.
        form: how figures are written.
    """

    number: int
    text: str
    bound: float
    find: Callable[[Results], dict[str, float]]
    at_most: bool = True
    form: str = "{:.3f}"

    def row(self, results: Results) -> Row:
        found = self.find(results)
        sign = "≤" if self.at_most else "≥"
        told = ", ".join(f"{name} {self.form.format(value)}" for name, value in found.items())
        return str(self.number), self.text, f"{sign} {self.form.format(self.bound)}", told or "–", self._verdict(found)

    def _verdict(self, found: dict[str, float]) -> str:
        if not found:
            return "not measured"
        misses = [value for value in found.values() if (value > self.bound if self.at_most else value < self.bound)]
        return "**missed**" if misses else "reached"


def _figures(cell: dict[str, Any] | None, key: str, exchange_only: bool = True) -> dict[str, float]:
    """Case -> median of a spread, or a plain figure, of each case that was measured."""
    found = {}
    for case, record in (cell or {"cases": {}})["cases"].items():
        if key in record and not (exchange_only and case == "off"):
            found[case] = record[key]["median"] if isinstance(record[key], dict) else record[key]
    return found


def _ratios(cell: dict[str, Any] | None) -> dict[str, float]:
    return {case: ratio["median"] for case, ratio in (cell or {"ratios": {}})["ratios"].items()}


def _place(shape: str, threads: int, prompt: int, lattice_time: int) -> dict[str, Any]:
    return {"shape": shape, "threads": threads, "prompt": prompt, "lattice_time": lattice_time}


def _step(shape: str) -> Callable[[Results], dict[str, float]]:
    return lambda results: _figures(results.newest("decode", _place(shape, 4, 50, 0)), "step_ms")


def _step_ratio(*place: Any) -> Callable[[Results], dict[str, float]]:
    return lambda results: _ratios(results.newest("decode", _place(*place)))


def _prefill_ratio(results: Results) -> dict[str, float]:
    cells = [results.newest("decode", _place("qwen3-1.7b", num_threads, 2048, 0)) for num_threads in (1, 128)]
    one, many = (_figures(cell, "prefill_ms", exchange_only=False) for cell in cells)
    return {case: many[case] / one[case] for case in one if case in many}


def _memory_ratio(shape: str) -> Callable[[Results], dict[str, float]]:
    return lambda results: _ratios(results.newest("memory", {"shape": shape, "threads": 128}))


def _training_ratio(threads: int, length: int) -> Callable[[Results], dict[str, float]]:
    return lambda results: _by_setting(_training(results, threads, length), _ratios)


def _matrix_share(results: Results) -> dict[str, float]:
    return _by_setting(_training(results, 4, 2048), lambda cell: _figures(cell, "matrix_share", exchange_only=False))


def _training(results: Results, threads: int, length: int) -> dict[str, Any] | None:
    """The fastest setting without exchange: whether to recompute and to compile is the user's choice."""
    place = {"shape": "qwen3-1.7b", "threads": threads, "length": length}
    cells = [
        results.newest("train", place | {"checkpointing": recomputed, "compile": compiled})
        for recomputed in (True, False)
        for compiled in (True, False)
    ]
    timed = [cell for cell in cells if cell and "step_ms" in cell["cases"].get("off", {})]
    return min(timed, key=lambda cell: cell["cases"]["off"]["step_ms"]["median"], default=None)


def _by_setting(cell: dict[str, Any] | None, figures: Callable[[dict[str, Any]], dict[str, float]]) -> dict[str, float]:
    """Figures of a training cell, each named with its setting."""
    if cell is None:
        return {}
    setting = "+".join(name for name in ("checkpointing", "compile") if cell[name])
    return {f"{case} ({setting})" if setting else case: figure for case, figure in figures(cell).items()}


def _rollout(results: Results) -> dict[str, Any] | None:
    return results.newest("rollout", {"shape": "qwen3-1.7b", "groups": 32, "threads": 4, "new_tokens": 512})


TARGETS = (
    Target(1, "decoding step, 1.7B, N=4, context 50, exchange on, ms", 1.3, _step("qwen3-1.7b")),
    Target(1, "the same, 4B, ms", 2.8, _step("qwen3-4b")),
    Target(2, "exchange on / off, 1.7B, N=4, context 50", 1.05, _step_ratio("qwen3-1.7b", 4, 50, 0)),
    Target(2, "… prompt 2,048", 1.08, _step_ratio("qwen3-1.7b", 4, 2048, 0)),
    Target(2, "… prompt 50, 2,048 columns already written", 1.08, _step_ratio("qwen3-1.7b", 4, 50, 2048)),
    Target(2, "… 4B, N=128, context 50 (paper 1.964)", 1.10, _step_ratio("qwen3-4b", 128, 50, 0)),
    Target(3, "prefill, 1.7B, prompt 2,048, N=128 / N=1", 1.15, _prefill_ratio),
    Target(4, "peak memory, N=128, on / off, 1.7B", 1.05, _memory_ratio("qwen3-1.7b")),
    Target(4, "… 4B (paper 1.149)", 1.05, _memory_ratio("qwen3-4b")),
    Target(5, "training step, 1.7B, 4 × 2,048 tokens, on / off", 1.02, _training_ratio(4, 2048)),
    Target(5, "… 8 × 4,096 tokens", 1.05, _training_ratio(8, 4096)),
    Target(
        5,
        "SFT, 1.7B, 4 × 2,048 tokens, of the matrix rate",
        0.45,
        _matrix_share,
        at_most=False,
        form="{:.1%}",
    ),
    Target(
        6,
        "rollout, 1.7B, 32 × 4 × 512, of the bandwidth-bound limit",
        0.50,
        lambda results: _figures(_rollout(results), "share_of_limit"),
        at_most=False,
        form="{:.1%}",
    ),
)


def _targets(results: Results) -> str:
    rows = [target.row(results) for target in TARGETS]
    return markdown(("#", "target", "asked", "measured", ""), rows, left=5)


# ---------------------------------------------------------------- tables


def markdown(headings: Row, rows: Sequence[Row], left: int) -> str:
    """A table whose first ``left`` columns are text and whose others are figures."""
    lines = [headings, tuple("---" if index < left else "---:" for index in range(len(headings))), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _machines(results: Results) -> str:
    rows = [
        (
            f"`{record['file']}`",
            "`" + " ".join(record["command"]) + "`",
            _commit(record["machine"]["git"]),
            record["machine"]["name"],
            f"{record['machine']['versions']['torch']}, {record['machine']['versions']['transformers']}",
            f"{record['machine']['bandwidth']['median'] / 1e12:.2f} TB/s",
            f"{record['machine']['matrix_rate']['median'] / 1e12:.0f} TFLOP/s",
        )
        for record in results.records
    ]
    headings = ("file", "command", "commit", "hardware", "torch, transformers", "device copy", "matrix product")
    return markdown(headings, rows, left=5) if rows else NOTHING


def _commit(git: dict[str, Any]) -> str:
    commit = (git["commit"] or "unknown")[:7]
    return f"{commit} and changes" if git["dirty"] else commit


def _theme(theme: str) -> Callable[[Results], str]:
    """The table of a theme: the terminal's, with shape and variant in front."""

    def table(results: Results) -> str:
        layout = LAYOUTS[theme]
        cells = [cell for cell in results.cells(theme) if "peers" not in cell.values]
        rows = [
            (", ".join(filter(None, (cell.shape, cell.variant))), *row)
            for cell in cells
            for row in layout.rows(cell.values)
        ]
        left = 1 + layout.headings.index("exchange") + 1
        return markdown(("model", *layout.headings), rows, left) if rows else NOTHING

    return table


def _standing(results: Results) -> str:
    """The step of the issue's first table: floor, peers and ours, all of the newest run with peers for each shape."""
    columns: dict[str, dict[str, str]] = {}
    for shape in ("qwen3-1.7b", "qwen3-4b"):
        place = _place(shape, 4, 50, 0)
        ours, others = results.newest("decode", place), results.newest("decode", place, kind="peers")
        columns[shape] = dict(_standing_rows(ours, others))
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [(name, *(column.get(name, "–") for column in columns.values())) for name in names]
    return markdown(("ms per decoding step", "1.7B", "4B"), rows, left=1) if rows else NOTHING


def _standing_rows(ours: dict[str, Any] | None, others: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if ours and "floor" in ours["cases"].get("off", {}):
        yield "floor, exchange off: bytes read / measured bandwidth", f"{ours['cases']['off']['floor']['ms']:.3f}"
    for peer, record in (others or {"peers": {}})["peers"].items():
        yield label(peer), milliseconds(record["step_ms"]) if "step_ms" in record else "does not run"
    for case, record in (ours or {"cases": {}})["cases"].items():
        ratio = f", on/off {ours['ratios'][case]['median']:.3f}" if ours and case in ours["ratios"] else ""
        told = milliseconds(record["step_ms"]) if "step_ms" in record else record["error"]
        yield f"**ours, exchange {case}**", f"**{told}**{ratio}"


def _prefill(results: Results) -> str:
    """Prefill time and prompt KV of every decoding cell, as measured and as copies for every thread would be."""
    sizes = ("prompt_once_bytes", "prompt_per_thread_bytes", "own_bytes")
    rows = [
        (cell.shape, str(cell.values["threads"]), f"{cell.values['prompt']:,}", case)
        + (milliseconds(record["prefill_ms"]), *(size(record["kv"][name]) for name in sizes))
        for cell in results.cells("decode", {"variant": "", "lattice_time": 0})
        for case, record in cell.values.get("cases", {}).items()
        if "prefill_ms" in record
    ]
    headings = ("model", "N", "prompt", "exchange", "prefill ms", "prompt KV", "copied N times", "own KV")
    return markdown(headings, rows, left=4) if rows else NOTHING


def _failures(results: Results) -> str:
    """What peers said that did not run, word for word."""
    lines = {
        f"- {label(peer)}: `{' '.join(record['error'].split())}`\n": None
        for cell in results.cells("decode")
        for peer, record in cell.values.get("peers", {}).items()
        if "error" in record
    }
    return "".join(lines) or "All peers ran.\n"


NOTHING = "Not measured yet.\n"
TABLES: dict[str, Callable[[Results], str]] = {
    "targets": _targets,
    "standing": _standing,
    "prefill": _prefill,
    "failures": _failures,
    "runs": _machines,
    **{theme: _theme(theme) for theme in LAYOUTS},
}
