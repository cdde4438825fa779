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
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

from lace_lightning.whole_file import append_lines, open_lines, whole_file, write_text

Record = dict[str, Any]

HEADER = "run.json"
RECORDS = "records.jsonl"
REFUSED = "refused.jsonl"
CHUNK_BYTES = 256 * 1024  # below MLflow's limit of 1 MB for one request
BATCHED = ("metrics", "param", "tag")
"""Kinds of records of which one request takes many."""
_FIELDS = {
    "metrics": {"time", "step", "values"},
    "param": {"key", "value"},
    "tag": {"key", "value"},
    "artifact": {"file", "folder"},
    "weights": {"step", "tags", "values"},
    "uses": {"runs"},
    "trace": {"trace_id", "name", "tags", "spans"},
    "status": {"status", "time"},
}

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
        self._add(record, self.folder / relative, content)

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
        line = json.dumps(record) + "\n"
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


class SpoolReader:
    """Reading end of a spool: records in order from the first one that is not yet acknowledged.

    Raises:
        ValueError: ``run.json`` is damaged; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            header = json.loads((folder / HEADER).read_text())
            self.run_id, self.tracking_uri = str(header["run_id"]), str(header["tracking_uri"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / HEADER} is damaged ({error!r}): it must name run_id and tracking_uri"
            ) from error
        self._offset_path = folder / "offset"
        self._offset = _read_offset(self._offset_path)

    def sync(self) -> None:
        """Make what is in the spool survive a power cut. Not the writer's job: training need not wait for the disk."""
        path = self.folder / RECORDS
        if path.exists():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())

    def read(self) -> tuple[list[Record], int]:
        """The next records to send together, and the offset to acknowledge once they have been sent.

        They are some ``CHUNK_BYTES`` of metrics, params and tags, or one record of another kind: what has arrived is
        noted at once, so that on a line that often fails there is progress.
        """
        path = self.folder / RECORDS
        if not path.exists():
            return [], self._offset
        with path.open("rb") as stream:
            stream.seek(self._offset)
            lines = stream.readlines(CHUNK_BYTES)
        records, end = [], self._offset
        for line in lines:
            if not line.endswith(b"\n"):  # being written, or cut off by a kill
                break
            record = _parsed(line)
            is_alone = record["kind"] not in BATCHED
            if is_alone and records:
                break
            records.append(record)
            end += len(line)
            if is_alone:
                break
        return records, end

    def acknowledge(self, records: list[Record], end: int) -> None:
        """Note that everything before ``end`` has arrived and drop the copies of its artifacts."""
        self._offset = end
        try:
            write_text(self._offset_path, str(end))
        except OSError as error:  # at worst everything is sent again, which changes nothing
            log.debug("%s", error)
        for record in records:
            if record["kind"] == "artifact":
                shutil.rmtree((self.folder / record["file"]).parent, ignore_errors=True)

    def pending(self) -> int:
        """Number of records that have not been acknowledged."""
        path = self.folder / RECORDS
        if not path.exists():
            return 0
        with path.open("rb") as stream:
            stream.seek(self._offset)
            return sum(line.endswith(b"\n") for line in stream)

    def refuse(self, record: Record, reason: str) -> None:
        """Set a record aside that the server will never accept; its artifact's copy, if any, stays."""
        kept = dict(record)
        if record["kind"] == "artifact":
            refused, copy = self.folder / "refused" / record["file"], self.folder / record["file"]
            refused.parent.mkdir(parents=True, exist_ok=True)
            if copy.exists():  # else it was moved before, and the disk too full for the line
                os.replace(copy, refused)
            kept["file"] = refused.relative_to(self.folder).as_posix()
        with open_lines(self.folder / REFUSED) as file:
            append_lines(file, json.dumps({**kept, "reason": reason}) + "\n")


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


def _read_offset(path: Path) -> int:
    """Zero if it is missing or damaged: everything is sent again then, which changes nothing."""
    try:
        return max(0, int(path.read_text()))
    except (FileNotFoundError, ValueError):
        return 0


def _parsed(line: bytes) -> Record:
    try:
        record: Record = json.loads(line)
        if _FIELDS[record["kind"]] <= record.keys():
            return record
    except (ValueError, KeyError, TypeError):  # a disk error; every line that we write is complete
        pass
    return {"kind": "unreadable", "line": line.decode(errors="replace")}


def _folder_of(target: PurePosixPath) -> str | None:
    folder = target.parent.as_posix()
    return None if folder == "." else folder
