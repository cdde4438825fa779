"""Results as curves and bars, drawn without pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lace_lightning.bench.peers import label
from lace_lightning.bench.record import shape_name
from lace_lightning.bench.report import Cell, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"off": "0.35", "causal": "tab:blue", "aligned": "tab:orange", "window": "tab:green"}
AXES = {
    "threads": "threads N",
    "prompt": "prompt tokens",
    "lattice_time": "columns already written",
    "width": "lattice width r",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Write every figure that the results suffice for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for shape in dict.fromkeys(record["shape"] for record in results.records):
        name = shape_name(shape)
        growth = results.cells("growth", {"shape": shape, "variant": ""})
        if growth:
            written.append(_save(growth_figure(growth), folder / f"growth_{name}.svg"))
        peers = results.newest("decode", {"shape": shape}, kind="peers")
        ours = peers and results.newest("decode", {"shape": shape} | _place(peers))
        if peers and ours:
            written.append(_save(steps_figure(ours, peers), folder / f"steps_{name}.svg"))
    return written


def growth_figure(cells: Sequence[Cell]) -> Figure:
    """Step time above, peak memory below; a column per sweep, a line per case, the floor of ``off`` dashed."""
    figure = _figure(14, 6)
    grid = figure.subplots(2, len(AXES), squeeze=False)
    for column, (sweep, heading) in enumerate(AXES.items()):
        above, below = grid[0][column], grid[1][column]
        _curves(above, [cell.values for cell in cells if cell.values["sweep"] == sweep], _step)
        floors = [(cell.values["at"], _floor(cell.values)) for cell in cells if cell.values["sweep"] == sweep]
        above.plot(*_points(floors), color=COLOURS["off"], linestyle="--", linewidth=1, label="floor, off")
        _curves(below, [cell.values for cell in cells if cell.values["sweep"] == f"memory against {sweep}"], _peak)
        above.set(title=heading, ylabel="ms per step" if column == 0 else None)
        below.set(xlabel=heading, ylabel="peak memory, GB" if column == 0 else None)
        if not below.lines:
            below.set_axis_off()  # along lattice time no memory is measured
    grid[0][0].legend()
    return figure


def steps_figure(ours: dict[str, Any], peers: dict[str, Any]) -> Figure:
    """A bar per implementation, ours below the others."""
    bars = {label(name): record for name, record in peers["peers"].items()}
    bars |= {f"ours, exchange {case}": record for case, record in ours["cases"].items()}
    bars = {name: record for name, record in bars.items() if "step_ms" in record}
    figure = _figure(8, 1 + 0.35 * len(bars))
    axes = figure.subplots()
    medians = [record["step_ms"]["median"] for record in bars.values()]
    colours = ["tab:blue" if name.startswith("ours") else "0.7" for name in bars]
    axes.bar_label(axes.barh(list(bars), medians, color=colours), fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel=f"ms per decoding step, N={ours['threads']}, prompt {ours['prompt']}")
    return figure


def _curves(axes: Axes, cells: Sequence[dict[str, Any]], figure_of: Any) -> None:
    for case in dict.fromkeys(case for cell in cells for case in cell["cases"]):
        points = [(cell["at"], figure_of(cell["cases"].get(case, {}))) for cell in cells]
        axes.plot(*_points(points), marker="o", markersize=3, color=COLOURS.get(case), label=case)
    axes.set_xscale("log", base=2)
    at = sorted({cell["at"] for cell in cells})
    axes.set_xticks(at, [f"{value:,}" for value in at], rotation=30)
    axes.grid(alpha=0.3)
    if cells:
        axes.set_ylim(bottom=0)


def _points(points: Sequence[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    """Abscissae and ordinates of the points that were measured, in order."""
    measured = sorted((x, y) for x, y in points if y is not None)
    return [x for x, _ in measured], [y for _, y in measured]


def _step(record: dict[str, Any]) -> float | None:
    return record["step_ms"]["median"] if "step_ms" in record else None


def _peak(record: dict[str, Any]) -> float | None:
    peak = record.get("peak_bytes")
    return None if peak is None else peak / 1e9


def _floor(cell: dict[str, Any]) -> float | None:
    return cell["cases"].get("off", {}).get("floor", {}).get("ms")


def _place(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name != "peers"}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    """As SVG, the same bytes for the same results."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "lace"}):
        figure.savefig(path, metadata={"Date": None})
    return path
