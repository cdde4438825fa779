"""Outcomes of an evaluation in MLflow: a run with tables, and traces with a span per thread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lace_lightning.evaluation.judged import JudgedOutcome, JudgedPassage
from lace_lightning.evaluation.report import markdown, sheets
from lace_lightning.evaluation.store import read_outcomes
from lace_lightning.evaluation.summary import BenchmarkSummary
from lace_lightning.tracking.logger import MLflowLogger
from lace_lightning.tracking.traces import ThreadSpan, last_column, make_trace
from lace_lightning.viewer.folder import VIEWER

if TYPE_CHECKING:
    from lace_lightning.evaluation.spec import TrackingSpec

INTEREST = ("found but not chosen", "chosen right", "not found")
"""How outcomes ended, the most telling first."""


def log_evaluation(
    folder: str | Path,
    summaries: Sequence[BenchmarkSummary],
    tracking: TrackingSpec,
    settings: dict[str, Any],
    command: str = "",
    weights_of: Sequence[str] = (),
    is_of_one: bool = False,
) -> str:
    """Log a finished evaluation, whose folder has its viewer's page; returns the id of its run.

    Args:
        folder: where its outcomes lie.
        summaries: of them.
        tracking: where it goes.
        settings: of the evaluation.
        command: repeats it.
        weights_of: ids of the runs whose checkpoints were evaluated.
        is_of_one: all of these make up one model, that of the last one: the numbers are shown with its weights too.

    Raises:
        TrackingError: the store does not answer.
    """
    logger = MLflowLogger(tracking.experiment, tracking.run_name, tracking.uri, system_seconds=0)
    try:
        _log(logger, folder, summaries, settings, command)
        logger.use_weights(weights_of, evaluates=is_of_one)
        logger.log_metrics(_metrics(summaries))
        for record in chosen_for_traces(read_outcomes(folder), tracking.max_traces):
            logger.log_trace(trace_of(record))
    except BaseException:
        logger.finalize("failed")
        raise
    logger.finalize("success")
    return str(logger.run_id)


def _log(
    logger: MLflowLogger,
    folder: str | Path,
    summaries: Sequence[BenchmarkSummary],
    settings: dict[str, Any],
    command: str,
) -> None:
    """What the evaluation is, and its tables."""
    logger.log_hyperparams(settings)
    logger.describe(_what(summaries), command)
    logger.log_tag("lace.stage", "eval")
    for sheet in sheets(summaries):
        rows = [dict(zip(sheet.columns, row, strict=True)) for row in sheet.rows]
        logger.log_table(rows, sheet.title.replace(":", "").replace(" ", "_"))
    logger.log_text(markdown(summaries), "report.md")
    logger.log_text(Path(folder, VIEWER).read_text(encoding="utf-8"), VIEWER)


def chosen_for_traces(records: Iterable[JudgedOutcome], most: int) -> list[JudgedOutcome]:
    """At most so many of each method on each benchmark, those of more interest first, then as they came."""
    kept: dict[tuple[str, str], dict[str, list[JudgedOutcome]]] = {}
    for record in records:
        by_interest = kept.setdefault((record.benchmark, record.method), {how: [] for how in INTEREST})
        if len(by_interest[record.found]) < most:
            by_interest[record.found].append(record)
    return [record for kinds in kept.values() for record in sum(kinds.values(), [])[:most]]


def trace_of(record: JudgedOutcome, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """One trace, found by its tags ``outcome``, ``benchmark``, ``method``, ``seed``, ``problem`` and the given ones.

    When the threads were written is not known any more. A trace ends now and takes the outcome's seconds; a thread's
    span takes its share of the decoding steps.
    """
    steps = max((last_column(passage.passage.thread.columns) for passage in record.passages), default=1)
    chosen = None if record.chosen is None else record.passages[record.chosen].passage.thread.answer
    return make_trace(
        f"{record.method} · {record.problem.id}",
        inputs={"problem": record.problem.text, "reference answer": record.problem.answer},
        outputs={"answer": chosen, "outcome": record.found},
        attributes=_attributes(record),
        tags={
            "outcome": record.found,
            "benchmark": record.benchmark,
            "method": record.method,
            "seed": str(record.seed),
            "problem": record.problem.id,
            **(tags or {}),
        },
        threads=[
            ThreadSpan(
                f"{passage.passage.role} {index}",
                passage.passage.thread.text,
                passage.passage.thread.answer,
                _passage_attributes(passage, index == record.chosen),
                last_column(passage.passage.thread.columns) / steps,
            )
            for index, passage in enumerate(record.passages)
        ],
        end=time.time_ns(),
        duration=int(record.cost.seconds * 1e9),
    )


def _attributes(record: JudgedOutcome) -> dict[str, Any]:
    numbers = {name: value for name, value in record.statistics.items() if math.isfinite(value)}
    return {"confidence": record.confidence, "chosen": record.chosen, **numbers, "notes": dict(record.notes)}


def _passage_attributes(record: JudgedPassage, is_chosen: bool) -> dict[str, Any]:
    thread = record.passage.thread
    return {
        "tag": thread.tag,
        "verdict": record.verdict,
        "tokens": thread.num_tokens,
        "gate_mean": record.mean_gate,
        "chosen": is_chosen,
        "role": record.passage.role,
        "group": record.passage.group,
        "finished": thread.finished,
    }


def _what(summaries: Sequence[BenchmarkSummary]) -> str:
    methods = dict.fromkeys(method.method for summary in summaries for method in summary.methods)
    benchmarks = ", ".join(summary.benchmark for summary in summaries)
    return f"Evaluation of {', '.join(methods)} on {benchmarks}: `report.md` has the tables, Traces the groups."


def _metrics(summaries: Sequence[BenchmarkSummary]) -> dict[str, float]:
    return {
        f"eval/{summary.benchmark}/{method.method}/{name}": part.value
        for summary in summaries
        for method in summary.methods
        for name, part in method.statistics.items()
        if math.isfinite(part.value)
    }
