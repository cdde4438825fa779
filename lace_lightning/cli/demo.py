"""``lace demo``: threads that talk beside threads that don't, from nothing to a table in minutes on a CPU."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lace_lightning.cli.demo_plan import FINAL, LANES, PRETRAIN, Step
from lace_lightning.cli.main import explain
from lace_lightning.cli.next_steps import say_next
from lace_lightning.whole_file import write_text

if TYPE_CHECKING:
    from rich.console import Console

    from lace_lightning.cli.demo_lane import LaneOptions
    from lace_lightning.tracking import MLflowLogger

METHODS = {"lace": "LACE", "isolated": "Isolated", "independent": "Independent"}
COLUMNS = {
    "acc": "acc",
    "best_at_n": "best@4",
    "vote_at_n": "vote@4",
    "mean_at_n": "mean@4",
    "expl": "expl",
    "fmt": "fmt",
}


class LaneFailed(RuntimeError):
    """A lane of the demo ended early; the message names its log."""


def run(argv: Sequence[str]) -> int:
    """Run the demo; returns the exit code."""
    arguments = _parser().parse_args(argv)
    from rich.console import Console

    console = Console()
    options = _options(arguments)
    console.print(_introduction(options), highlight=False)
    from lace_lightning.tracking import TrackingError
    from lace_lightning.tracking.recipe import recipe

    start = time.perf_counter()
    name, what = (
        f"demo-seed{options.seed}",
        "**Demo**: threads that read each other beside threads that don't, on doors.",
    )
    try:
        with recipe(name, what, f"lace demo {shlex.join(argv)}".strip(), "demo") as parent:
            seconds = _train(options, console)
            summary = summarise(options.folder, options.seed, seconds | {"total": time.perf_counter() - start})
            _log(summary, parent)
    except (LaneFailed, TrackingError) as error:
        print(f"lace demo: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:  # the folder cannot be written, or holds something else
        return explain(error)
    except KeyboardInterrupt:
        print(f"lace demo: stopped; what was done so far is in {options.folder}", file=sys.stderr)
        return 130
    write_text(options.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    _show(summary, options.folder, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace demo", description="Train and compare threads that read each other and threads that don't."
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where it all goes (default: runs/demo)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: shows that it runs, no more")
    return parser


def _options(arguments: argparse.Namespace) -> LaneOptions:
    from lace_lightning.cli.demo_lane import LaneOptions

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quick = {"max_steps": 2, "num_problems": 20} if arguments.quick else {}
    return LaneOptions(arguments.folder, arguments.seed, max(1, cores // len(LANES)), **quick)


def _introduction(options: LaneOptions) -> str:
    return (
        "[bold]doors[/bold]: a prize behind one of 8 doors, 4 threads with 2 tries each.\n"
        "Threads that cannot read each other find it together at most 68.4 % of the time,\n"
        "whatever they compute: 1 − (1 − 2/8)⁴, a theorem (docs/puzzles.md).\n"
        "More than that is information that passed between threads.\n"
        f"Weights, numbers and logs go to {options.folder}, MLflow's runs to runs/.\n"
    )


# -------------------------------------------------------------------- training


def _train(options: LaneOptions, console: Console) -> dict[str, float]:
    """Train and play everything; returns seconds by step."""
    options.folder.mkdir(parents=True, exist_ok=True)
    everything = (PRETRAIN, *(step for steps in LANES.values() for step in steps))
    with _Board(everything, console) as board:
        _run_lanes({"backbone": (PRETRAIN,)}, options, board)
        _run_lanes(LANES, options, board)
    return board.seconds


def _run_lanes(lanes: dict[str, tuple[Step, ...]], options: LaneOptions, board: _Board) -> None:
    """Run lanes side by side in processes of their own until all have ended.

    Raises:
        LaneFailed: one of them failed; the others are stopped.
    """
    from queue import Empty

    from lace_lightning.cli.demo_lane import run_lane

    context = get_context("spawn")
    events: Any = context.Queue()
    processes = {
        name: context.Process(target=run_lane, args=(name, steps, options, events), name=name, daemon=True)
        for name, steps in lanes.items()
    }
    with _one_openmp_thread_each(options.num_cpu_threads):
        for process in processes.values():
            process.start()
    try:
        is_running = True
        while is_running or not events.empty():
            is_running = any(process.is_alive() for process in processes.values())  # before a last look at exit codes
            try:
                board.hear(events.get(timeout=0.2))
            except Empty:
                pass
            if failed := [name for name, process in processes.items() if process.exitcode]:
                raise LaneFailed(f"the lane {failed[0]} failed; its log is {options.folder / failed[0]}.log")
    finally:
        for process in processes.values():
            if process.is_alive():
                process.terminate()
        for process in processes.values():
            process.join(timeout=30)


@contextmanager
def _one_openmp_thread_each(count: int) -> Iterator[None]:
    """Started processes inherit OMP_NUM_THREADS, which OpenMP reads once, before torch can be asked."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


class _Board:
    """A progress bar for every step."""

    def __init__(self, steps: Sequence[Step], console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.seconds: dict[str, float] = {}
        self._progress = Progress(*columns, console=console)
        self._tasks = {
            step.name: self._progress.add_task(step.name, total=None, start=False, note="") for step in steps
        }

    def __enter__(self) -> _Board:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def hear(self, event: Any) -> None:
        task = self._tasks[event.step]
        if event.kind == "begun":
            self._progress.start_task(task)
            self._progress.update(task, total=event.total, completed=0, note=event.phase)
        elif event.kind == "moved":
            self._progress.update(task, total=event.total, completed=event.done, note=event.note or event.phase)
        elif event.kind == "ended":
            self.seconds[event.step] = event.seconds
            self._progress.stop_task(task)
            self._progress.update(task, note="done")
        else:
            self._progress.update(task, note=f"failed: {event.note}")


# -------------------------------------------------------------------- results


def summarise(folder: Path, seed: int, seconds: dict[str, float]) -> dict[str, Any]:
    """The demo's results: metrics and 95 % intervals by method and by stage, seconds, versions."""
    steps = [step for lane in LANES.values() for step in lane if step.is_validated]
    read = {step.name: json.loads(step.metrics(folder).read_text()) for step in steps}
    return {
        "ceiling": read[FINAL["lace"]]["ceiling"],
        "num_groups": read[FINAL["lace"]]["num_groups"],
        "methods": {method: read[name]["metrics"] for method, name in FINAL.items()},
        "intervals": {method: read[name]["intervals"] for method, name in FINAL.items()},
        "stages": {
            name: {"seconds": spent, "metrics": read.get(name, {}).get("metrics")} for name, spent in seconds.items()
        },
        "seed": seed,
        "versions": {name: version(name) for name in ("lace-lightning", "torch", "lightning", "transformers")}
        | {"python": platform.python_version()},
    }


def conclude(summary: dict[str, Any]) -> str:
    """One plain sentence on what the numbers show."""
    found = summary["methods"]["lace"]["best_at_n"]
    low = summary["intervals"]["lace"]["best_at_n"][0]
    ceiling, chosen = summary["ceiling"], summary["methods"]["lace"]["acc"]
    if low <= ceiling:
        return (
            f"The talking threads found the prize in {found:.1%} of the puzzles, which is not clearly above the "
            f"{ceiling:.1%} that threads reach without reading each other: this run does not show that they talk."
        )
    return (
        f"The talking threads found the prize in {found:.1%} of the puzzles, which no threads that cannot read each "
        f"other could ({ceiling:.1%} at best): they talk. In {chosen:.1%} they also agreed on which of them had it."
    )


def _log(summary: dict[str, Any], parent: MLflowLogger) -> None:
    """The table of methods, and its numbers, in the parent run."""
    parent.log_metrics(
        {f"eval/doors/{name}/{key}": row[key] for name, row in summary["methods"].items() for key in COLUMNS}
    )
    rows = [{"method": name, **{key: row[key] for key in COLUMNS}} for name, row in summary["methods"].items()]
    parent.log_table([*rows, {"method": "ceiling", "best_at_n": summary["ceiling"]}], "methods")
    parent.log_text(json.dumps(summary, indent=2), "summary.json")


def _show(summary: dict[str, Any], folder: Path, console: Console) -> None:
    from lace_lightning.cli import generate

    console.print()
    console.print(_table(summary))
    console.print(f"\n{conclude(summary)}\n", highlight=False)
    step = LANES["lace"][-1]
    source = ["--config", str(step.config(folder)), "--ckpt", str(step.checkpoint(folder))]
    generate.run([*source, "--problem", "7", "--quiet"])
    run = shlex.join(source)
    console.print(f"\nAll numbers: {folder / 'summary.json'}.", highlight=False)
    say_next(
        ("browse the runs in MLflow, experiment “demo”", "lace ui"),
        ("watch another group", f"lace generate {run} --problem 8"),
        ("put the winner into MLflow's registry", f"lace register {run} --name doors"),
    )


def _table(summary: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    title = f"{summary['num_groups']:,} fresh puzzles, seed {summary['seed']}, with 95 % intervals"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for method, label in METHODS.items():
        metrics, intervals = summary["methods"][method], summary["intervals"][method]
        table.add_row(label, *(f"[bold]{metrics[key]:.3f}[/bold]" for key in COLUMNS))
        table.add_row("", *(f"[dim]{_interval(intervals[key])}[/dim]" for key in COLUMNS))
    table.add_row("Ceiling", "", f"[bold]{summary['ceiling']:.3f}[/bold]", *[""] * (len(COLUMNS) - 2))
    return table


def _interval(ends: Sequence[float]) -> str:
    """Short, so that the table fits 80 columns: ``.942–.958``."""
    return "–".join(f"{end:.3f}".removeprefix("0") for end in ends)
