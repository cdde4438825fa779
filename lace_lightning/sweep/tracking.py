"""A sweep in MLflow: one parent run, to which its stages and evaluations are children."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from lace_lightning.sweep.points import spelled
from lace_lightning.sweep.spec import SweepSpec, Tracking
from lace_lightning.sweep.table import Result
from lace_lightning.tracking import store
from lace_lightning.tracking.logger import PARENT_RUN


def open_parent(tracking: Tracking, sweep: SweepSpec, source: str) -> str:
    """A new parent run; returns its id.

    Args:
        tracking: where.
        sweep: what it is of.
        source: the sweep's file, for the command that reproduces it.

    Raises:
        TrackingError: the store does not answer.
    """
    uri = store.resolve_tracking_uri(tracking.uri)
    note = f"{sweep.description}\n\nReproduce: `lace sweep {source}`"
    tags = {"sweep": sweep.name, "mlflow.note.content": note}
    return store.open_run(store.connect(uri), uri, tracking.experiment, sweep.name, tags).info.run_id


def environment_of(tracking: Tracking | None, parent: str | None) -> Mapping[str, str]:
    """What makes the runs of a trial's commands children of the parent, and leads them to its store.

    The store's address may hold a password, and so goes into no file.
    """
    if parent is None or tracking is None:
        return {}
    return {PARENT_RUN: parent, "MLFLOW_TRACKING_URI": store.resolve_tracking_uri(tracking.uri)}


def log_result(tracking: Tracking, parent: str, result: Result, folder: Path) -> None:
    """Put the table, its figure and its numbers into the parent run, which ends once nothing is open."""
    uri = store.resolve_tracking_uri(tracking.uri)
    client = store.connect(uri)
    for row in result.rows:
        name = f"{result.sweep.metric}/{_key(row.measured.label)}"
        if math.isfinite(row.metric.value):
            client.log_metric(parent, name, row.metric.value)
    for file in sorted(folder.glob("report.*")):
        client.log_artifact(parent, str(file))
    if not result.num_open:
        client.set_terminated(parent, "FAILED" if result.failures else "FINISHED")


def _key(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-. " else "_" for letter in spelled(label))
