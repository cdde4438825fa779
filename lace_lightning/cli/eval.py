"""``lace eval``: methods on benchmarks, compared at equal cost; ``lace eval report`` renders stored outcomes again."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lace_lightning.cli.main import INTERRUPTED, explain
from lace_lightning.cli.next_steps import say_next

if TYPE_CHECKING:
    from rich.progress import Progress

    from lace_lightning.evaluation.spec import EvaluationSpec
    from lace_lightning.evaluation.summary import BenchmarkSummary

PIPE_WIDTH = 140
"""Columns where the output is no terminal."""

SETTINGS = """settings (in YAML; docs/evaluation.md has all of them):
  output      folder of outcomes and reports; the same command resumes what is there
  policies    models by name: spec, init_from, tokenizer, decoding, max_length
  methods     by name: class_path and init_args, the name of their policy among them
  benchmarks  by name: task, problems (a file or a hub name), num_problems
  sweeps      a method at several budgets: {vote: {num_threads: [1, 4, 16]}} makes vote@1, vote@4, vote@16
  seeds, batch_size, reference, embedder, gates, reads, tracking

examples:
  lace eval --config configs/eval/puzzles.yaml --config configs/eval/benchmarks/doors.yaml
  lace eval --config my_models.yaml --config configs/eval/benchmarks/gsm8k.yaml --output=runs/eval/gsm8k
  lace eval --config my_models.yaml --config configs/eval/benchmarks/aime24.yaml \\
      --benchmarks.aime24.problems=data/aime2024.jsonl --seeds=[0,1,2]
  lace eval report runs/eval/gsm8k --reference lace
"""


def run(argv: Sequence[str]) -> int:
    """Evaluate, or report; the exit code: 0, 1 if outcomes failed, 2 for a mistake, 130 after Ctrl-C."""
    try:
        return _report(argv[1:]) if argv[:1] == ["report"] else _evaluate(argv)
    except (ValueError, OSError) as error:
        return explain(error)


def _evaluate(argv: Sequence[str]) -> int:
    from lace_lightning.cli.shipped import with_shipped_configs

    given, options = _parser().parse_known_args(with_shipped_configs(argv))
    if not given.config:
        raise ValueError("give at least one --config FILE; lace eval --help shows examples")
    from lace_lightning.cli.eval_config import parse, read_settings
    from lace_lightning.tracking import TrackingError

    settings = read_settings(given.config, options)
    spec, meanings = parse(settings)
    try:
        _check_tracking(spec)
        return _run(spec, meanings, settings, f"lace eval {shlex.join(argv)}")
    except TrackingError as error:
        return explain(error)
    except KeyboardInterrupt:
        print(f"\nlace eval: stopped; the same command goes on from what is in {spec.output}")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace eval",
        usage="lace eval --config FILE [--config FILE …] [--name.of.setting=value …]\n"
        "       lace eval report FOLDER [--reference METHOD]",
        description="Run methods (LACE, voting, judging, …) on the same problems and compare them at\nequal tokens and "
        "at equal seconds. Later configs and options win over earlier\nones; mappings are merged.",
        epilog=SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML of settings; may be repeated"
    )
    return parser


def _run(spec: EvaluationSpec, meanings: dict[str, Any], settings: dict[str, Any], command: str) -> int:
    from lace_lightning.evaluation.spec import evaluate
    from lace_lightning.tracking.redact import redact

    with _progress() as progress:

        def start(total: int) -> Callable[[str, int], None]:
            task = progress.add_task("", total=total)
            return lambda name, count: progress.update(task, advance=count, description=name)

        kept: Any = redact(meanings)
        evaluate(spec, kept, start)
    num_failures = _render(Path(spec.output), None, lambda summaries: _log(summaries, spec, settings, command))
    return 1 if num_failures else 0


def _log(summaries: Sequence[BenchmarkSummary], spec: EvaluationSpec, settings: dict[str, Any], command: str) -> None:
    """Put the evaluation into MLflow, if it is tracked."""
    if spec.tracking is None:
        return
    from lace_lightning.tracking.outcome_traces import log_evaluation

    is_of_one = len(spec.policies) == 1
    run_id = log_evaluation(spec.output, summaries, spec.tracking, settings, command, _writers(spec), is_of_one)
    print(f"MLflow run {run_id} in experiment {spec.tracking.experiment!r}")


def _progress() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


def _writers(spec: EvaluationSpec) -> list[str]:
    """Ids of the runs that wrote the evaluated checkpoints."""
    from lace_lightning.checkpoints import writer_of

    found = [writer_of(path) for policy in spec.policies.values() for path in policy.init_from]
    return [run for run in found if run is not None]


def _check_tracking(spec: EvaluationSpec) -> None:
    """Reach the tracking store before the work, not after it."""
    if spec.tracking is not None:
        from lace_lightning.tracking import MLflowLogger

        MLflowLogger(spec.tracking.experiment, spec.tracking.run_name, spec.tracking.uri)


def _report(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lace eval report", description="Show and write the tables of stored outcomes again; no model is loaded."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the output folder of lace eval")
    parser.add_argument("--reference", metavar="METHOD", help="compare with this method instead of the configured one")
    given = parser.parse_args(argv)
    _render(given.folder, given.reference)
    return 0


def _render(folder: Path, reference: str | None, log: Callable[[list[BenchmarkSummary]], None] | None = None) -> int:
    """Print the tables, write them and the viewer's page into the folder; returns how many failed."""
    from rich.console import Console

    from lace_lightning.evaluation.parquet import write_parquet
    from lace_lightning.evaluation.report import markdown, sheets
    from lace_lightning.evaluation.store import read_failures, read_outcomes
    from lace_lightning.evaluation.summary import as_json, summarise_folder
    from lace_lightning.printable import printable
    from lace_lightning.viewer.folder import write_viewer
    from lace_lightning.whole_file import write_text

    summaries, failures = summarise_folder(folder, reference), read_failures(folder)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for sheet in sheets(summaries, for_terminal=True):
        console.print(sheet.table(), "")
    write_text(folder / "report.md", markdown(summaries))
    write_text(folder / "summary.json", json.dumps(as_json(summaries), indent=2) + "\n")
    write_parquet(read_outcomes(folder), folder / "groups.parquet")
    write_viewer(folder)
    console.print(
        f"report.md, summary.json, groups.parquet, viewer.html and outcomes.jsonl are in {folder}", soft_wrap=True
    )
    for failure in failures[:5]:
        failed = f"failed: {' · '.join(map(str, failure.key))}: {failure.type}: {failure.message}"
        console.print(printable(failed), markup=False)  # it may quote data
    if failures:
        console.print(
            f"{len(failures)} outcomes failed (errors.jsonl); the same command tries them again", markup=False
        )
    if log is not None:
        log(summaries)
    place = shlex.quote(str(folder))
    say_next(
        ("look at the threads of every problem", f"lace view {place}"),
        ("these tables again, compared with another method", f"lace eval report {place} --reference METHOD"),
        ("browse runs and traces in MLflow", "lace ui"),
    )
    return len(failures)
