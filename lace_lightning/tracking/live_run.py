"""A run of MLflow while it lasts: its spool, and what sends from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from lace_lightning.tracking import store
from lace_lightning.tracking.names import file_name
from lace_lightning.tracking.redact import redact_uri
from lace_lightning.tracking.sender import Sender
from lace_lightning.tracking.spool import Record, Spool
from lace_lightning.tracking.spool_reader import SpoolReader

FLUSH_SECONDS = 10.0

log = logging.getLogger(__name__)


class LiveRun:
    """A new run, opened in its store; what is added goes to its spool, and from there to the store in the background.

    Args:
        tracking_uri: a resolved one.
        experiment_name: created if there is none.
        name: of the run; MLflow invents one if None.
        tags: of the run.
        folder: of the experiment; the run's own lies in it and is called ``version``.

    Raises:
        TrackingError: the store does not answer.
        OSError: the spool cannot be made.
    """

    def __init__(
        self, tracking_uri: str, experiment_name: str, name: str | None, tags: Mapping[str, str], folder: Path
    ) -> None:
        self.client = store.connect(tracking_uri)
        info = store.open_run(self.client, tracking_uri, experiment_name, name, tags).info
        self.id, self.name = info.run_id, info.run_name
        self.version = f"{file_name(self.name)}-{self.id[:8]}"
        self._uri = redact_uri(tracking_uri)
        self._spool = Spool(folder / self.version / "spool", self.id, self._uri)
        self._sender = Sender(self.client, SpoolReader(self._spool.folder), tracking_uri, on_end=self._spool.close)

    def append(self, record: Record) -> None:
        """Add a record."""
        self._spool.append(record)
        self._sender.start()

    def add_file(self, content: bytes, artifact_file: str) -> None:
        """Add an artifact; ValueError if its path leads outside the run."""
        self._spool.add_file(content, artifact_file)
        self._sender.start()

    def flush(self) -> None:
        """Send what is left for at most ten seconds, and say what could not be sent. More may be added later."""
        unwritten = self._spool.settle()
        try:
            left = self._sender.close(FLUSH_SECONDS)
        except KeyboardInterrupt:  # a second Ctrl-C: the user will not wait
            left = SpoolReader(self._spool.folder).pending()
        if unwritten and not left:
            unwritten -= self._sender.send_past_the_spool(self._spool.unwritten())
        if not self._sender.is_busy:  # else the spool stays locked until it ends, lest `lace sync` send the same too
            self._spool.close()
        self._say_what_stays(left, unwritten)

    def look_up(self, run_id: str) -> tuple[str, dict[str, str] | None]:
        """Link and parameters of a run; a store that is away, or another one, costs words of a description, no more."""
        try:
            run = store.run_or_none(self.client, run_id)
        except Exception as error:
            log.warning("Run %s cannot be looked up for the description: %s", run_id, redact_uri(str(error)))
            run = None
        if run is None:
            return f"`{run_id}`", None
        page = f"#/experiments/{run.info.experiment_id}/runs/{run_id}"
        return f"[{run.info.run_name}]({page})", dict(run.data.params)

    def _say_what_stays(self, left: int, unwritten: int) -> None:
        if unwritten:
            log.error("No room in %s: %d records of this run are lost.", self._spool.folder, unwritten)
        if left:
            log.warning(
                "%d records of run %s could not be sent to %s. Nothing is lost; when it answers again: lace sync %s",
                left,
                self.name,
                self._uri,
                self._spool.folder,
            )
