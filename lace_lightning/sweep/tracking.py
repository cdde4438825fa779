"""A sweep in MLflow: one parent run, to which its stages and evaluations are children."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lace_lightning.sweep.spec import SweepSpec, Tracking
from lace_lightning.sweep.table import Result
from lace_lightning.tracking import store
from lace_lightning.tracking.logger import PARENT_RUN
from lace_lightning.tracking.note import NOTE, Note, how_it_went
from lace_lightning.tracking.redact import redact
from lace_lightning.tracking.run_info import git_state

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

COMMIT, DIRTY = "git.commit", "git.dirty"


def open_parent(tracking: Tracking, sweep: SweepSpec, source: str) -> str:
    """A new parent run; returns its id.

    Args:
        tracking: where.
        sweep: what it is of; its settings become the artifact ``sweep.yaml``.
        source: the sweep's file, for the command that repeats it.

    Raises:
        TrackingError: the store does not answer.
    """
    uri = store.resolve_tracking_uri(tracking.uri)
    git = git_state(Path.cwd())
    tags = {"sweep": sweep.name, "lace.stage": "sweep"}
    tags |= {} if git is None else {COMMIT: git["commit"], DIRTY: str(git["dirty"]).lower()}
    tags[NOTE] = _note(sweep, source, tags).markdown(how_it_went("RUNNING", 0.0, None, {}))
    client = store.connect(uri)
    run_id = str(store.open_run(client, uri, tracking.experiment, sweep.name, tags).info.run_id)
    with store.remedies(uri):
        client.log_text(run_id, yaml.safe_dump(redact(asdict(sweep)), sort_keys=False), "sweep.yaml")
    return run_id


def environment_of(tracking: Tracking | None, parent: str | None) -> Mapping[str, str]:
    """What makes the runs of a trial's commands children of the parent, and leads them to its store.

    The store's address may hold a password, and so goes into no file.
    """
    if parent is None or tracking is None:
        return {}
    return {PARENT_RUN: parent, "MLFLOW_TRACKING_URI": store.resolve_tracking_uri(tracking.uri)}


def log_result(tracking: Tracking, parent: str, result: Result, folder: Path, source: str) -> None:
    """Put the table, its figure and its numbers into the parent run, which ends once nothing is open.

    Raises:
        TrackingError: the store does not answer, or the run is gone from it.
    """
    uri = store.resolve_tracking_uri(tracking.uri)
    client = store.connect(uri)
    with store.remedies(uri):
        _send_result(client, parent, result, folder, source)


def _send_result(client: MlflowClient, parent: str, result: Result, folder: Path, source: str) -> None:
    for row in result.rows:
        gap = math.nan if row.difference is None else row.difference.value
        numbers = {"": row.metric.value, "_difference": gap, "_p": row.p_value}
        for name, value in numbers.items():
            if math.isfinite(value):
                client.log_metric(parent, f"{result.sweep.metric}{name}/{_key(row.measured.label)}", value)
    for file in sorted(folder.glob("report.*")):
        client.log_artifact(parent, str(file))
    status = "RUNNING" if result.num_open else "FAILED" if result.failures else "FINISHED"
    run = client.get_run(parent)
    seconds = time.time() - run.info.start_time / 1000
    went = f"{how_it_went(status, seconds, None, {})} {_result(result)}"
    client.set_tag(parent, NOTE, _note(result.sweep, source, run.data.tags).markdown(went))
    if status != "RUNNING":
        client.set_terminated(parent, status)


def _note(sweep: SweepSpec, source: str, tags: Mapping[str, str]) -> Note:
    seeds = ", ".join(map(str, sweep.seeds))
    varied = ", ".join(sweep.rows or sweep.axes)
    what = (
        f"**Sweep** `{sweep.name}`. {sweep.description}\n\nVaried: {varied}. Seeds: {seeds}. `report.md` has the table."
    )
    return Note(what, f"lace sweep {source}", tags.get(COMMIT), tags.get(DIRTY) == "true")


def _result(result: Result) -> str:
    """What came out, in a sentence."""
    counts = [f"{len(result.rows)} rows are measured"]
    counts += [f"{result.num_open} trials open"] if result.num_open else []
    counts += [f"{len(result.failures)} trials failed"] if result.failures else []
    told = ", ".join(counts) + "."
    known = [row for row in result.rows if math.isfinite(row.metric.value)]
    if not known:
        return told
    pick = max if result.sweep.direction == "maximize" else min
    best = pick(known, key=lambda row: row.metric.value)
    gap = math.nan if best.difference is None else best.difference.value
    told_gap = f" ({gap:+.3f} to the base)" if math.isfinite(gap) else ""
    return f"{told} Best {result.sweep.metric}: {best.measured.label}, {best.metric.value:.3f}{told_gap}."


def _key(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-. " else "_" for letter in label)
