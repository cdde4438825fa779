"""Outcomes of an evaluation in MLflow: a run with tables, and traces with a span per thread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lace_lightning.evaluation.judged import JudgedOutcome, JudgedPassage
from lace_lightning.evaluation.report import markdown, sheets
from lace_lightning.evaluation.store import read_outcomes
from lace_lightning.evaluation.summary import BenchmarkSummary
from lace_lightning.tracking.logger import MLflowLogger
from lace_lightning.viewer.folder import VIEWER

if TYPE_CHECKING:
    from lace_lightning.evaluation.spec import TrackingSpec

INTEREST = ("found but not chosen", "chosen right", "not found")
"""How outcomes ended, the most telling first."""


def log_evaluation(
    folder: str | Path, summaries: Sequence[BenchmarkSummary], tracking: TrackingSpec, settings: dict[str, Any]
) -> str:
    """Log a finished evaluation, whose folder has its viewer's page; returns the id of its run.

    Raises:
        TrackingError: the store does not answer.
    """
    logger = MLflowLogger(tracking.experiment, tracking.run_name, tracking.uri)
    logger.log_hyperparams(settings)
    logger.log_metrics(_metrics(summaries))
    for sheet in sheets(summaries):
        rows = [dict(zip(sheet.columns, row, strict=True)) for row in sheet.rows]
        logger.log_table(rows, sheet.title.replace(":", "").replace(" ", "_"))
    logger.log_text(markdown(summaries), "report.md")
    logger.log_text(Path(folder, VIEWER).read_text(encoding="utf-8"), VIEWER)
    run_id = str(logger.run_id)
    log_traces(chosen_for_traces(read_outcomes(folder), tracking.max_traces), logger.tracking_uri, run_id)
    logger.finalize("success")
    return run_id


def chosen_for_traces(records: Iterable[JudgedOutcome], most: int) -> list[JudgedOutcome]:
    """At most so many of each method on each benchmark, those of more interest first, then as they came."""
    kept: dict[tuple[str, str], dict[str, list[JudgedOutcome]]] = {}
    for record in records:
        by_interest = kept.setdefault((record.benchmark, record.method), {how: [] for how in INTEREST})
        if len(by_interest[record.found]) < most:
            by_interest[record.found].append(record)
    return [record for kinds in kept.values() for record in sum(kinds.values(), [])[:most]]


def log_traces(records: Sequence[JudgedOutcome], tracking_uri: str, run_id: str) -> None:
    """One trace per outcome, found by its tags ``outcome``, ``benchmark``, ``method``, ``seed`` and ``problem``.

    When the threads were written is not known any more. A trace ends now and takes the outcome's seconds; a thread's
    span takes its share of the decoding steps.
    """
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    experiment_id = mlflow.MlflowClient(tracking_uri).get_run(run_id).info.experiment_id
    for record in records:
        _log_trace(record, run_id, experiment_id)
    mlflow.flush_trace_async_logging()


def _log_trace(record: JudgedOutcome, run_id: str, experiment_id: str) -> None:
    import mlflow

    duration = max(1, int(record.cost.seconds * 1e9))
    start = time.time_ns() - duration
    root = mlflow.start_span_no_context(
        f"{record.method} · {record.problem.id}",
        inputs={"problem": record.problem.text, "reference answer": record.problem.answer},
        attributes=_attributes(record),
        tags={
            "outcome": record.found,
            "benchmark": record.benchmark,
            "method": record.method,
            "seed": str(record.seed),
            "problem": record.problem.id,
        },
        metadata={"mlflow.sourceRun": run_id},
        experiment_id=experiment_id,
        start_time_ns=start,
    )
    steps = max((_last_column(passage) for passage in record.passages), default=1)
    for index, passage in enumerate(record.passages):
        span = mlflow.start_span_no_context(
            f"{passage.passage.role} {index}",
            parent_span=root,
            attributes=_passage_attributes(passage, index == record.chosen),
            start_time_ns=start,
        )
        span.set_outputs({"text": passage.passage.thread.text, "answer": passage.passage.thread.answer})
        span.end(end_time_ns=start + duration * _last_column(passage) // steps)
    chosen = None if record.chosen is None else record.passages[record.chosen].passage.thread.answer
    root.set_outputs({"answer": chosen, "outcome": record.found})
    root.end(end_time_ns=start + duration)


def _last_column(passage: JudgedPassage) -> int:
    columns = passage.passage.thread.columns
    return columns[-1] + 1 if columns else 1


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


def _metrics(summaries: Sequence[BenchmarkSummary]) -> dict[str, float]:
    return {
        f"eval/{summary.benchmark}/{method.method}/{name}": part.value
        for summary in summaries
        for method in summary.methods
        for name, part in method.statistics.items()
        if math.isfinite(part.value)
    }
