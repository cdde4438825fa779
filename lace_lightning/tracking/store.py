"""Where runs are tracked: tracking URIs, and opening a run in an MLflow store."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lace_lightning.tracking.redact import redact, redact_uri

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

DEFAULT_TRACKING_URI = "sqlite:///runs/mlflow.db"
_SQLITE = "sqlite:///"

# We repeat requests ourselves, so a single one must fail fast. What the user has set in the environment wins.
_MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints the password of the address, too
}


class TrackingError(RuntimeError):
    """The tracking store cannot be used; the message names it and the remedy."""


def resolve_tracking_uri(uri: str | None) -> str:
    """``uri``, else ``MLFLOW_TRACKING_URI``, else :data:`DEFAULT_TRACKING_URI`; an sqlite file's path made absolute.

    Raises:
        ValueError: a plain folder or ``file:`` URI, which MLflow no longer accepts.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI
    if uri.startswith(_SQLITE):
        return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).absolute())
    if urlsplit(uri).scheme in ("", "file") and uri != "databricks":
        raise ValueError(
            f"tracking_uri={uri!r} is a folder, which MLflow no longer accepts as a store: "
            f"use tracking_uri={DEFAULT_TRACKING_URI!r} or the http:// address of a server"
        )
    return uri


def is_server(uri: str) -> bool:
    """Whether the store is reached over the network."""
    return not uri.startswith(_SQLITE)


def connect(uri: str) -> MlflowClient:
    """A client of the store; creates an sqlite file if there is none. Does not yet talk to a server.

    Raises:
        TrackingError: the sqlite file is damaged or foreign, or there is no room for it.
    """
    for name, value in _MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # a new sqlite file is no news
    with remedies(uri):
        if uri.startswith(_SQLITE):
            Path(uri.removeprefix(_SQLITE)).parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(uri)


def open_run(
    client: MlflowClient, uri: str, experiment_name: str, run_name: str | None, tags: Mapping[str, str]
) -> Run:
    """A new run, in an experiment that is created if need be, with MLflow's usual tags about who started it from where.

    Raises:
        TrackingError: the store does not answer, or holds a deleted experiment of this name.
    """
    from mlflow.tracking.context.registry import resolve_tags

    with remedies(uri), _one_at_a_time(uri):
        experiment_id = _experiment_id(client, uri, experiment_name)
        # Among them are the address of the checkout's remote and what MLFLOW_RUN_CONTEXT says.
        noted: Any = redact(resolve_tags(tags))
        return client.create_run(experiment_id, tags=noted, run_name=run_name)


def check(client: MlflowClient, uri: str) -> None:
    """Ask the store anything at all.

    Raises:
        TrackingError: it does not answer.
    """
    with remedies(uri):
        client.search_experiments(max_results=1)


def run_or_none(client: MlflowClient, run_id: str) -> Run | None:
    """The run; None where the store does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return _experiment_id(client, uri, name)  # another run was faster
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment_name={name!r} was deleted in {redact_uri(uri)}: choose another experiment_name, or restore it "
            f"with `mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return experiment.experiment_id


@contextmanager
def remedies(uri: str) -> Iterator[None]:
    """Say which option is at fault, and what to do, when the store does not work.

    Raises:
        TrackingError: it does not answer, or there is no room in it.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except TrackingError:
        raise
    except (MlflowException, SQLAlchemyError, OSError) as error:
        remedy = "Start the server" if is_server(uri) else "Make room if the disk is full, move a damaged file away"
        raise TrackingError(
            f"tracking_uri={redact_uri(uri)!r} cannot be used: {redact_uri(str(error))}\n"
            f"{remedy}, or log locally with tracking_uri={DEFAULT_TRACKING_URI!r}."
        ) from error


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Runs that start together would otherwise create the tables of a new sqlite file twice."""
    if is_server(uri):
        yield
        return
    with open(uri.removeprefix(_SQLITE) + ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _artifact_location(uri: str) -> str | None:
    """A server knows where it keeps artifacts; those of an sqlite file lie beside it, of other databases in runs/."""
    if uri.startswith("http") or uri.startswith("databricks"):
        return None
    folder = Path(uri.removeprefix(_SQLITE)).parent if uri.startswith(_SQLITE) else Path("runs").absolute()
    return str(folder / "mlartifacts")
