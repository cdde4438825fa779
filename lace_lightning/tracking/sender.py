"""Carrying records from a spool to MLflow, in the background while a run lasts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lace_lightning.tracking.redact import redact_uri
from lace_lightning.tracking.spool import Record
from lace_lightning.tracking.spool_reader import BATCHED, REFUSED, SpoolReader
from lace_lightning.tracking.traces import send_trace
from lace_lightning.tracking.weights import model_of, send_uses, send_weights

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SEND_SECONDS = 2.0
MAX_WAIT_SECONDS = 30.0
_CLOSING_WAIT_SECONDS = 0.5

_SICK_DATABASE = ("QueuePool limit", "DatabaseError", "InternalError", "InterfaceError", "PendingRollbackError")
"""In the message of an error: the database is busy or damaged, and the records are not to blame."""

log = logging.getLogger(__name__)


def drain(client: MlflowClient, reader: SpoolReader) -> None:
    """Send everything that is in the spool now.

    Raises:
        Exception: whatever the store raised; what was not acknowledged stays in the spool.
    """
    while True:
        records, end = reader.read()
        if not records:
            return
        if records[0]["kind"] == "unreadable":
            _set_aside(reader, records[0], "the line is damaged on this disk")
        else:
            _send(client, reader, records)
        reader.acknowledge(records, end)


def _send(client: MlflowClient, reader: SpoolReader, records: list[Record]) -> None:
    """Send records as one batch; if the store rejects it, one by one, setting aside those that it never will take."""
    try:
        if records[0]["kind"] in BATCHED:
            _send_batch(client, reader, records)
        else:
            _SEND[records[0]["kind"]](client, reader, records[0])
    except Exception as error:
        if not _is_refusal(error):
            raise
        if len(records) > 1:
            for record in records:
                _send(client, reader, [record])
            return
        _set_aside(reader, records[0], str(error))


def _set_aside(reader: SpoolReader, record: Record, reason: str) -> None:
    reader.refuse(record, reason)
    log.warning("MLflow refused a record, which is kept in %s: %s", reader.folder / REFUSED, reason)


def _send_batch(client: MlflowClient, reader: SpoolReader, records: list[Record]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    evaluated = {record["weights_of"] for record in records if "weights_of" in record}
    models = {run_id: model_of(client, run_id) for run_id in evaluated}
    metrics = [
        Metric(key, value, record["time"], record["step"], model_id=models.get(record.get("weights_of")))
        for record in records
        if record["kind"] == "metrics"
        for key, value in record["values"].items()
    ]
    # A param with two values is in here twice: MLflow then refuses the batch, and of its records just the later one.
    params = dict.fromkeys((record["key"], record["value"]) for record in records if record["kind"] == "param")
    tags = {record["key"]: record["value"] for record in records if record["kind"] == "tag"}
    client.log_batch(
        reader.run_id,
        metrics=metrics,
        params=[Param(key, value) for key, value in params],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )


def _send_artifact(client: MlflowClient, reader: SpoolReader, record: Record) -> None:
    path = reader.folder / record["file"]
    if path.exists():  # else it was sent before: copies are dropped only then
        client.log_artifact(reader.run_id, str(path), record["folder"])


_SEND: dict[str, Callable[[MlflowClient, SpoolReader, Record], None]] = {
    "artifact": _send_artifact,
    "weights": lambda client, reader, record: send_weights(client, reader.run_id, record),
    "uses": lambda client, reader, record: send_uses(client, reader.run_id, record),
    "trace": lambda client, reader, record: send_trace(client, reader.run_id, record),
    "status": lambda client, reader, record: client.set_terminated(reader.run_id, record["status"], record["time"]),
}
"""How records are sent that no batch can hold."""


def _is_refusal(error: Exception) -> bool:
    """Whether sending the same again can never succeed. Everything else (no server, a busy one) is worth repeating."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        if isinstance(cause := error.__cause__, MlflowException | OSError):
            return _is_refusal(cause)  # MLflow's client calls a model that it could not look up an invalid parameter
        if error.error_code == "BAD_REQUEST":  # also what MLflow makes of most errors of its database
            return not any(sign in str(error) for sign in _SICK_DATABASE)
        return error.error_code in ("INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST")
    response = getattr(error, "response", None)  # requests.HTTPError of an artifact upload
    if response is not None:
        return response.status_code in (400, 413)
    return isinstance(error, PermissionError)  # an artifact folder that is not ours to write


class Sender:
    """One daemon thread that drains a spool every two seconds, more rarely while the store does not answer.

    Args:
        client, reader, tracking_uri: whom to send to, and from where.
        on_end: called by the thread when it ends, which may be after :meth:`close` has stopped waiting for it.
    """

    def __init__(
        self, client: MlflowClient, reader: SpoolReader, tracking_uri: str, on_end: Callable[[], None]
    ) -> None:
        self._client = client
        self._reader = reader
        self._uri = redact_uri(tracking_uri)
        self._on_end = on_end
        self._closing = threading.Event()
        self._give_up_at = 0.0
        self._thread: threading.Thread | None = None
        self._away = False

    def start(self) -> None:
        """Make sure that the thread runs."""
        self._closing.clear()
        if not self.is_busy:
            self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
            self._thread.start()

    def close(self, seconds: float) -> int:
        """Send what is left for at most ``seconds``; the number of records that could not be sent."""
        if self._reader.pending():
            self.start()
        self._give_up_at = time.monotonic() + seconds
        self._closing.set()
        if self._thread is not None:
            self._thread.join(seconds)
        return self._reader.pending()

    def send_past_the_spool(self, records: list[Record]) -> int:
        """Try once to send what found no room on the disk, after all that did; the number of records that arrived."""
        sent = 0
        try:
            for record in records:
                _send(self._client, self._reader, [record])
                sent += 1
        except Exception as error:
            log.warning("MLflow at %s does not take records either: %s", self._uri, redact_uri(str(error)))
        return sent

    @property
    def is_busy(self) -> bool:
        """Whether the thread still runs, say in a request that hangs."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._drain_until_closed()
        finally:
            self._on_end()

    def _drain_until_closed(self) -> None:
        wait = SEND_SECONDS
        while True:
            closing = self._closing.wait(wait)
            wait = SEND_SECONDS if self._try_to_drain() else min(2 * wait, MAX_WAIT_SECONDS)
            if not closing:
                continue
            if not self._away or time.monotonic() + _CLOSING_WAIT_SECONDS > self._give_up_at:
                return
            time.sleep(_CLOSING_WAIT_SECONDS)

    def _try_to_drain(self) -> bool:
        try:
            self._reader.sync()
            drain(self._client, self._reader)
        except Exception as error:
            if not self._away:
                log.warning(
                    "MLflow at %s does not take records now (%s). The run goes on; they wait in %s.",
                    self._uri,
                    redact_uri(str(error)).partition("\n")[0],
                    self._reader.folder,
                )
            self._away = True
            return False
        if self._away:
            log.warning("MLflow at %s takes records again; all that waited have been sent.", self._uri)
        self._away = False
        return True
