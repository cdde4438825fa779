"""``lace sweep``: many trials of a chain of stages and one table; ``--dry-run`` shows what would run."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from lace_lightning.cli.main import INTERRUPTED, explain
from lace_lightning.cli.next_steps import say_next

if TYPE_CHECKING:
    from lace_lightning.sweep.plan import Trial
    from lace_lightning.sweep.runner import Runner, RunOptions
    from lace_lightning.sweep.spec import SweepSpec
    from lace_lightning.sweep.table import Result

EXAMPLES = """examples:
  lace sweep configs/sweeps/exchange.yaml --dry-run
  lace sweep configs/sweeps/exchange.yaml
  lace sweep configs/sweeps/exchange_paper.yaml --workers 8 --gpus 0,1,2,3,4,5,6,7
  lace sweep configs/sweeps/exchange.yaml --storage postgresql://me@host/sweeps     (on any number of machines)

The same command goes on where it was; finished trials are not run again. docs/sweeps.md has the file's settings.
"""


def run(argv: Sequence[str]) -> int:
    """Run the sweep; the exit code: 0, 1 if trials failed or are open, 2 for a mistake, 130 after Ctrl-C."""
    given = _parser().parse_args(argv)
    from lace_lightning.sweep.reading import read_sweep
    from lace_lightning.tracking import TrackingError

    try:
        sweep = read_sweep(given.file)
        if given.dry_run:
            code = _dry_run(sweep)
            say_next(("run it", f"lace sweep {shlex.quote(given.file)}"))
            return code
        return _run(sweep, given)
    except (ValueError, OSError, TrackingError) as error:
        return explain(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace sweep",
        description="Run many trials of a chain of stages, each command in a process of its own, and make one table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="SWEEP.yaml", help="what to run")
    parser.add_argument("--dry-run", action="store_true", help="check every setting, print the plan, run nothing")
    parser.add_argument("--workers", type=int, default=1, help="trials at once on this machine (default: 1)")
    parser.add_argument("--gpus", default="", help="GPUs that the workers get in turn, for example 0,1,2,3")
    parser.add_argument("--retry-failed", action="store_true", help="run trials again that failed before")
    parser.add_argument("--storage", help="sqlite:///FILE or postgresql://… (default: study.db in the sweep's folder)")
    parser.add_argument(
        "--heartbeat",
        type=int,
        default=20,
        help="seconds between signs of life; a trial without any for three times as long is taken over (default: 20)",
    )
    return parser


def _dry_run(sweep: SweepSpec) -> int:
    from lace_lightning.sweep.plan import plan, plan_trial
    from lace_lightning.sweep.points import point_of
    from lace_lightning.sweep.runner import store_folder

    trials = plan(sweep)
    if sweep.search == "tpe":
        first = {name: _example(axis) for name, axis in sweep.axes.items()}
        trials = [plan_trial(sweep, point_of(sweep, first), seed) for seed in sweep.seeds]
        print(f"Optuna chooses {sweep.limits.trials} trials; one of them, to show the chain:")
    for line in _plan_lines(trials):
        print(line)
    folders = {folder for trial in trials for folder in (*(stage.folder for stage in trial.stages), trial.folder)}
    done = sum((store_folder(sweep) / folder / "done.json").exists() for folder in folders)
    stages = sum(len(trial.stages) + 1 for trial in trials)
    print(f"{len(trials)} trials: {stages} stages and evaluations, {len(folders)} different ones, {done} done before")
    return 0


def _example(axis: object) -> object:
    from lace_lightning.sweep.spec import Axis

    assert isinstance(axis, Axis)
    if axis.range is None:
        return next(iter([*axis.choices] or axis.values))
    return int(axis.range[0]) if axis.integer else axis.range[0]


def _plan_lines(trials: Sequence[Trial]) -> Iterator[str]:
    from lace_lightning.sweep.plan import difference

    bases = {trial.seed: trial for trial in reversed(trials)}
    for number, trial in enumerate(trials, start=1):
        yield f"{number}. {trial.point.label}, seed {trial.seed}"
        yield f"   {' > '.join([*(stage.folder for stage in trial.stages), trial.folder])}"
        if trial.seed == trials[0].seed:  # other seeds differ alike
            yield from (f"   {line}" for line in difference(trial, bases[trial.seed]))


def _run(sweep: SweepSpec, given: argparse.Namespace) -> int:
    from lace_lightning.sweep.runner import Runner, RunOptions

    if given.workers < 1 or given.heartbeat < 1:
        raise ValueError(f"--workers={given.workers} and --heartbeat={given.heartbeat} must be at least 1")
    gpus = [gpu for gpu in given.gpus.split(",") if gpu]
    options = RunOptions(given.file, given.storage, given.workers, gpus, given.retry_failed, given.heartbeat)
    runner = Runner(sweep, options, _tell)
    _tell(f"{sweep.name}: {len(runner.units) or sweep.limits.trials} trials; all of it goes to {runner.folder}")
    try:
        with _sigterm_interrupts():
            result = runner.run()
    except KeyboardInterrupt:
        runner.write()
        print(f"\nlace sweep: stopped; what was done so far is in {runner.folder}", file=sys.stderr)
        say_next(("go on from there", _again(options)))
        return INTERRUPTED
    _show(result, runner)
    return 1 if result.failures or result.num_open else 0


def _show(result: Result, runner: Runner) -> None:
    from rich.console import Console

    from lace_lightning.sweep.report import notes, table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(table(result))
    for line in notes(result):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"\nreport.md, report.csv and report.png are in {runner.folder}", soft_wrap=True)
    say_next(*_next(result, runner))


def _next(result: Result, runner: Runner) -> Iterator[tuple[str, str]]:
    again = _again(runner.options)
    if result.num_open:
        yield "go on with the trials that are open", again
    if result.failures:
        yield "run again what failed", f"{again} --retry-failed"
    if result.rows and (outcomes := runner.outcomes_of(result.rows[-1].measured.point)) is not None:
        yield "look at the threads of the last row", f"lace view {shlex.quote(str(outcomes))}"
    if result.sweep.tracking is not None:
        yield "browse the trials in MLflow", "lace ui"


def _again(options: RunOptions) -> str:
    """The command that goes on with the same study; a password in the storage's address is left to the user."""
    from lace_lightning.tracking.redact import redact_uri

    words = ["lace", "sweep", options.source]
    if options.storage is not None:
        words += ["--storage", redact_uri(options.storage)]
    if options.workers > 1:
        words += ["--workers", str(options.workers)]
    if options.gpus:
        words += ["--gpus", ",".join(options.gpus)]
    return shlex.join(words)


def _tell(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {message}", flush=True)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does: its commands are ended, and trials are given back."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
