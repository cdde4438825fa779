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
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from lace_lightning.tracking.redact import hide_known

Record = dict[str, Any]

HEADER = "run.json"
RECORDS = "records.jsonl"
CHUNK_BYTES = 256 * 1024  # below MLflow's limit of 1 MB for one request


class Spool:
    """Writing end of a spool; holds its lock while open, and opens again by itself after :meth:`close`.

    Every record reaches the operating system before ``append`` returns, so a killed process loses nothing; the sender
    calls :meth:`SpoolReader.sync` before it sends, so a power cut loses seconds.
    """

    def __init__(self, folder: Path, run_id: str, tracking_uri: str) -> None:
        self.folder = folder
        self._mutex = threading.Lock()
        self._stream: TextIO | None = None
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / HEADER, json.dumps({"run_id": run_id, "tracking_uri": tracking_uri}, indent=2))

    def append(self, record: Record) -> None:
        """Add one record."""
        line = hide_known(json.dumps(record)) + "\n"
        with self._mutex:
            if self._stream is None:
                self._stream = _open_locked(self.folder / RECORDS)
            self._stream.write(line)
            self._stream.flush()

    def add_file(self, content: bytes, artifact_file: str) -> None:
        """Keep ``content`` until it has been sent as the run's artifact ``artifact_file``, a relative POSIX path.

        Raises:
            ValueError: the path is empty, absolute or leads outside the run.
        """
        target = PurePosixPath(artifact_file)
        if not target.name or target.is_absolute() or ".." in target.parts:
            raise ValueError(f"artifact_file={artifact_file!r} must be a relative path inside the run's artifacts")
        relative = Path("files", uuid.uuid4().hex, target.name)
        path = self.folder / relative
        path.parent.mkdir(parents=True)
        path.write_bytes(_without_secrets(content))
        self.append({"kind": "artifact", "file": relative.as_posix(), "folder": _folder_of(target)})

    def close(self) -> None:
        """Let go of file and lock."""
        with self._mutex:
            if self._stream is not None:
                self._stream.close()
                self._stream = None


class SpoolReader:
    """Reading end of a spool: records in order from the first one that is not yet acknowledged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        header = json.loads((folder / HEADER).read_text())
        self.run_id: str = header["run_id"]
        self.tracking_uri: str = header["tracking_uri"]
        self._offset_path = folder / "offset"
        self._offset = int(self._offset_path.read_text()) if self._offset_path.exists() else 0

    def sync(self) -> None:
        """Make what is in the spool survive a power cut. Not the writer's job: training need not wait for the disk."""
        path = self.folder / RECORDS
        if path.exists():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())

    def read(self) -> tuple[list[Record], int]:
        """The next records, about ``CHUNK_BYTES`` of them, and the offset to acknowledge once they have been sent."""
        path = self.folder / RECORDS
        if not path.exists():
            return [], self._offset
        with path.open("rb") as stream:
            stream.seek(self._offset)
            lines = stream.readlines(CHUNK_BYTES)
        if lines and not lines[-1].endswith(b"\n"):  # being written, or cut off by a kill
            lines.pop()
        return list(_parsed(lines)), self._offset + sum(map(len, lines))

    def acknowledge(self, records: list[Record], end: int) -> None:
        """Note that everything before ``end`` has arrived and drop the copies of its artifacts."""
        self._offset = end
        replace_text(self._offset_path, str(end))
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
            refused = self.folder / "refused" / record["file"]
            refused.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / record["file"], refused)
            kept["file"] = refused.relative_to(self.folder).as_posix()
        with (self.folder / "refused.jsonl").open("a") as stream:
            stream.write(json.dumps({**kept, "reason": reason}) + "\n")


def is_live(folder: Path) -> bool:
    """Whether a running process holds the spool open."""
    try:
        _open_locked(folder / RECORDS).close()
    except BlockingIOError:
        return True
    return False


def replace_text(path: Path, text: str) -> None:
    """Write a file so that readers see all of the old or all of the new text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _open_locked(path: Path) -> TextIO:
    stream = path.open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise
    return stream


def _parsed(lines: list[bytes]) -> Iterator[Record]:
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        # Every line that we write is a whole record: anything else is a disk's error.
        is_record = isinstance(record, dict) and isinstance(record.get("kind"), str)
        yield record if is_record else {"kind": "unreadable", "line": line.decode(errors="replace")}


def _without_secrets(content: bytes) -> bytes:
    """A text without what the environment holds as secrets; anything else as it is."""
    try:
        return hide_known(content.decode()).encode()
    except UnicodeDecodeError:  # a picture
        return content


def _folder_of(target: PurePosixPath) -> str | None:
    folder = target.parent.as_posix()
    return None if folder == "." else folder
