"""Files and lines that are whole or absent, whatever ends the process that writes them, a full disk included."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the user's share of it, or the largest file that is allowed."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to instead of ``path``, whose place it takes when the block ends without an error.

    It lies in the same folder, so that taking the place is one step, and is on the disk before it does. After an error
    (a full disk, Ctrl-C) it is gone and ``path`` is as it was.

    Raises:
        OSError: there is no room; the message names the file and how much is free. Whatever else the block raises.
    """
    # Hosts that share the folder may have processes of the same number.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
    try:
        with _room_explained(path):
            yield unfinished
            with unfinished.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, line ends as they are; the file appears whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="")


def open_lines(path: Path) -> FileIO:
    """A file for :func:`append_lines`, made if it is not there. Nothing is buffered, so nothing can come late."""
    with _room_explained(path):
        return FileIO(str(path), "ab+")


def append_lines(file: FileIO, lines: str) -> None:
    """Append lines to a file: after an error (a full disk, Ctrl-C) all of them are there or none.

    Raises:
        OSError: there is no room; the message names the file and how much is free.
    """
    before, rest = file.seek(0, os.SEEK_END), memoryview(lines.encode())
    try:
        with _room_explained(Path(os.fsdecode(file.name))):
            while rest:
                rest = rest[file.write(rest) :]
    except BaseException:
        file.truncate(before)
        raise


@contextmanager
def _room_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if (cause := _no_room(error)) is None:
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            cause.errno,
            f"{cause.strerror}: {path} could not be written, with {free:,.1f} MB free there: make room. "
            "What was there before is as it was",
        ) from error


def _no_room(error: BaseException | None) -> OSError | None:
    """The full disk behind an error: torch and others raise errors of their own while they handle it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None
