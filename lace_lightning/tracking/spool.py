"""The local, append-only record of one run: nothing that was logged is lost while the tracking server is away.

A spool is a folder::

    run.json        which run of which store this is
    records.jsonl   one line per record, in the order in which they were logged
    offset          how many bytes of records.jsonl the server has acknowledged
    files/          artifacts that still have to be sent
    refused.jsonl   records that the server rejected for good, with its reason

Kinds of records: ``metrics`` (time, step, values; weights_of, a run), ``param`` and ``tag`` (key, value), ``artifact``
(file, folder), ``weights`` (step, tags, values), ``uses`` (runs), ``trace`` (trace_id, name, tags, spans), ``status``
(status, time). Times are milliseconds since 1970. Sending a record twice changes nothing, because MLflow's
primary key of a metric is all of run, name, time, step and value; so a sender may simply repeat what it is unsure of.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

from lace_lightning.tracking.redact import hide_known
from lace_lightning.whole_file import append_lines, open_lines, whole_file, write_text

Record = dict[str, Any]

HEADER = "run.json"
RECORDS = "records.jsonl"

log = logging.getLogger(__name__)


class Spool:
    """Writing end of a spool; holds its lock while open, and opens again by itself after :meth:`close`.

    Every record reaches the operating system before ``append`` returns, so a killed process loses nothing; the sender
    calls :meth:`SpoolReader.sync` before it sends, so a power cut loses seconds. While the disk is full, or `lace sync`
    holds the spool, records wait in memory and are written, in order, as soon as it can be: the run goes on.

    Raises:
        OSError: the folder or ``run.json`` cannot be written. Later errors of the disk are only warned of.
    """

    def __init__(self, folder: Path, run_id: str, tracking_uri: str) -> None:
        self.folder = folder
        self._mutex = threading.Lock()
        self._file: FileIO | None = None
        self._waiting: deque[tuple[str, Path, bytes | None]] = deque()
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / HEADER, json.dumps({"run_id": run_id, "tracking_uri": tracking_uri}, indent=2))

    def append(self, record: Record) -> None:
        """Add one record."""
        self._add(record, self.folder, None)

    def add_file(self, content: bytes, artifact_file: str) -> None:
        """Keep ``content`` until it has been sent as the run's artifact ``artifact_file``, a relative POSIX path.

        Raises:
            ValueError: the path is empty, absolute or leads outside the run.
        """
        target = PurePosixPath(artifact_file)
        if not target.name or target.is_absolute() or ".." in target.parts:
            raise ValueError(f"artifact_file={artifact_file!r} must be a relative path inside the run's artifacts")
        relative = Path("files", uuid.uuid4().hex, target.name)
        record = {"kind": "artifact", "file": relative.as_posix(), "folder": _folder_of(target)}
        self._add(record, self.folder / relative, _without_secrets(content))

    def settle(self) -> int:
        """Try once more to write what waits; the number of records for which there is still no room."""
        with self._mutex:
            if self._waiting:
                self._write()
            return len(self._waiting)

    def unwritten(self) -> list[Record]:
        """What waits for room, without the artifacts."""
        with self._mutex:
            return [json.loads(line) for line, _, content in self._waiting if content is None]

    def close(self) -> None:
        """Let go of file and lock."""
        with self._mutex:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _add(self, record: Record, path: Path, content: bytes | None) -> None:
        line = hide_known(json.dumps(record)) + "\n"
        with self._mutex:
            is_first = not self._waiting
            self._waiting.append((line, path, content))
            error = self._write()
        if error is not None and is_first:
            log.warning("%s. The run goes on; what it logs waits in memory until there is room.", error)
        if error is None and not is_first:
            log.warning("%s is written again: nothing that waited is missing.", self.folder)

    def _write(self) -> OSError | None:
        """Write what waits; the error that keeps it waiting."""
        try:
            if self._file is None:
                self._file = _open_locked(self.folder / RECORDS)
            while self._waiting:
                line, path, content = self._waiting[0]
                if content is not None:
                    _keep(path, content)
                append_lines(self._file, line)
                self._waiting.popleft()
        except OSError as error:
            return error
        return None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep others from writing a spool.

    Raises:
        BlockingIOError: a running process holds it.
    """
    with _open_locked(folder / RECORDS):
        yield


def _open_locked(path: Path) -> FileIO:
    file = open_lines(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _keep(path: Path, content: bytes) -> None:
    """Write an artifact's copy into a folder of its own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise


def _without_secrets(content: bytes) -> bytes:
    """A text without what the environment holds as secrets; anything else as it is."""
    try:
        return hide_known(content.decode()).encode()
    except UnicodeDecodeError:  # a picture
        return content


def _folder_of(target: PurePosixPath) -> str | None:
    folder = target.parent.as_posix()
    return None if folder == "." else folder
