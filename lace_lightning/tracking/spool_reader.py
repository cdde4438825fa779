"""The reading end of a spool: what is sent next, what has arrived, and what never will."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from lace_lightning.tracking.spool import HEADER, RECORDS, Record
from lace_lightning.whole_file import append_lines, open_lines, write_text

REFUSED = "refused.jsonl"
CHUNK_BYTES = 256 * 1024  # below MLflow's limit of 1 MB for one request
BATCHED = ("metrics", "param", "tag")
"""Kinds of records of which one request takes many."""
_NUMBER = (int, float)
_FIELDS: dict[str, dict[str, Any]] = {
    "metrics": {"time": _NUMBER, "step": _NUMBER, "values": dict},
    "param": {"key": str, "value": str},
    "tag": {"key": str, "value": str},
    "artifact": {"file": str, "folder": (str, NoneType)},
    "weights": {"step": _NUMBER, "tags": dict, "values": dict},
    "uses": {"runs": list},
    "trace": {"trace_id": str, "name": str, "tags": dict, "spans": list},
    "status": {"status": str, "time": _NUMBER},
}

log = logging.getLogger(__name__)


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
        records: list[Record] = []
        end = self._offset
        for line in lines:
            if not line.endswith(b"\n"):  # being written, or cut off by a kill
                break
            record = self._parsed(line)
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

    def _parsed(self, line: bytes) -> Record:
        try:
            record: Record = json.loads(line)
            if all(isinstance(record[name], kind) for name, kind in _FIELDS[record["kind"]].items()):
                if record["kind"] != "artifact" or self._is_copy(record["file"]):
                    return record
        except (ValueError, KeyError, TypeError, RecursionError):  # a disk error; every line that we write is complete
            pass
        return {"kind": "unreadable", "line": line.decode(errors="replace")}

    def _is_copy(self, file: str) -> bool:
        """Whether it lies in a folder of its own in ``files/``: it is sent, and that folder removed."""
        files, path = self.folder.resolve() / "files", (self.folder / file).resolve()
        return path.parent.parent == files and path.parent.name == PurePosixPath(file).parent.name


def _read_offset(path: Path) -> int:
    """Zero if it is missing or damaged: everything is sent again then, which changes nothing."""
    try:
        return max(0, int(path.read_text()))
    except (FileNotFoundError, ValueError):
        return 0
