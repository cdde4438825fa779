"""Groups as MLflow traces: a record for the spool with a span per thread, and its sending."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mlflow.entities import Span
    from mlflow.tracking import MlflowClient

_PREVIEW_CHARACTERS = 1000


class ThreadSpan(NamedTuple):
    """One span: its attributes (JSON values), and the share of the trace's time at which the thread ended."""

    name: str
    text: str
    answer: str | None
    attributes: Mapping[str, Any]
    ends_at: float


def make_trace(
    name: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    attributes: Mapping[str, Any],
    tags: Mapping[str, str],
    threads: Sequence[ThreadSpan],
    end: int,
    duration: int,
) -> dict[str, Any]:
    """A record of a trace, which MLflow finds by its tags. Times are in nanoseconds; ``end`` counts from 1970."""
    start = end - max(1, duration)
    root = _span(name, None, start, end, attributes, inputs, outputs)
    spans = [root]
    for thread in threads:
        ended = start + max(1, int((end - start) * thread.ends_at))
        said = {"text": thread.text, "answer": thread.answer}
        spans.append(_span(thread.name, root["span_id"], start, ended, thread.attributes, None, said))
    # Tags and names are what a search sees; the id makes sending twice harmless.
    return {"trace_id": uuid.uuid4().hex, "name": name, "tags": dict(tags), "spans": spans}


def last_column(columns: Sequence[int]) -> int:
    """Number of decoding steps until a thread's last token."""
    return columns[-1] + 1 if columns else 1


def send_trace(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    """Write a trace and its spans under the ids that the record gives them."""
    from mlflow.entities import TraceData, TraceInfo, TraceLocation, TraceState
    from mlflow.tracing.client import TracingClient

    experiment_id = client.get_run(run_id).info.experiment_id
    tracing = TracingClient(client.tracking_uri)
    root = record["spans"][0]
    milliseconds = root["start"] // 10**6
    info = TraceInfo(
        trace_id=f"tr-{record['trace_id']}",
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=milliseconds,
        execution_duration=root["end"] // 10**6 - milliseconds,
        state=TraceState.OK,
        request_preview=json.dumps(root["inputs"])[:_PREVIEW_CHARACTERS],
        response_preview=json.dumps(root["outputs"])[:_PREVIEW_CHARACTERS],
        trace_metadata={"mlflow.sourceRun": run_id, "mlflow.trace_schema.version": "3"},
        tags={"mlflow.traceName": record["name"], **record["tags"]},
    )
    spans = [_entity(record["trace_id"], span) for span in record["spans"]]
    try:
        tracing.log_spans(experiment_id, spans)
        tracing.start_trace(info)
    except NotImplementedError:  # an older server: its store has no place for spans, they become an artifact
        tracing._upload_trace_data(tracing.start_trace(info), TraceData(spans))


def _span(
    name: str,
    parent: str | None,
    start: int,
    end: int,
    attributes: Mapping[str, Any],
    inputs: Mapping[str, Any] | None,
    outputs: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "span_id": uuid.uuid4().hex[:16],
        "parent": parent,
        "name": name,
        "start": start,
        "end": end,
        "attributes": dict(attributes),
        "inputs": inputs,
        "outputs": outputs,
    }


def _entity(trace_id: str, span: Mapping[str, Any]) -> Span:
    """MLflow's own object; attribute values are JSON texts there."""
    from mlflow.entities import Span

    attributes = {
        **span["attributes"],
        "mlflow.traceRequestId": f"tr-{trace_id}",
        "mlflow.spanType": "CHAIN" if span["parent"] is None else "LLM",
        "mlflow.spanOutputs": span["outputs"],
    }
    if span["inputs"] is not None:
        attributes["mlflow.spanInputs"] = span["inputs"]
    return Span.from_dict(
        {
            "trace_id": f"tr-{trace_id}",
            "span_id": span["span_id"],
            "parent_span_id": span["parent"],
            "name": span["name"],
            "start_time_unix_nano": span["start"],
            "end_time_unix_nano": span["end"],
            "status": {"code": "STATUS_CODE_OK", "message": ""},
            "events": [],
            "attributes": {name: json.dumps(value) for name, value in attributes.items()},
        }
    )
