"""Folders that are whole or absent, whatever ends the process that writes them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill instead of ``path``, whose place it takes when the block ends without an error.

    Its files are on the disk before it does. After an error (a full disk, Ctrl-C) it is gone and ``path`` is as it was.
    """
    unfinished, old = (path.with_name(f".{path.name}.{os.getpid()}.{state}") for state in ("part", "old"))
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process: in containers ids come again
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in unfinished.rglob("*"):
            _flush(file)
        _flush(unfinished)
        if path.exists():  # no file system replaces a folder that is not empty in one step
            path.rename(old)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
