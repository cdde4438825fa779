"""Folders that one process at a time works in."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LOCK = ".lock"
"""Name of the file in the folder that is locked; it stays when the lock is gone."""

log = logging.getLogger(__name__)


class FolderBusyError(ValueError):
    """Another process works in the folder; the message names both and the remedy."""


class FolderLock:
    """Holds a folder, which is made if need be, until :meth:`release` or the death of this process, however it dies.

    A record lock of the system: processes that this one forks (workers of a data loader) do not keep it, and it works
    across the machines that share a file system. Where the folder cannot be written or the file system has no locks,
    that is a warning: nothing is held.

    Args:
        folder: what to hold.
        remedy: ends the sentence "Wait until that run has ended, stop it with kill -TERM, or …".

    Raises:
        FolderBusyError: another process holds it.
    """

    def __init__(self, folder: Path, remedy: str) -> None:
        self.folder = folder
        self._descriptor: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            log.warning("%s is not locked against a second run: %s", folder, error)
            return
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows both
            owner = _owner(descriptor)
            os.close(descriptor)
            raise FolderBusyError(
                f"{folder} is in use by {owner}. Wait until that run has ended, stop it with kill -TERM, or {remedy}"
            ) from None
        except OSError as error:
            os.close(descriptor)
            log.warning("%s is not locked against a second run, its file system has no locks: %s", folder, error)
            return
        _sign(descriptor)
        self._descriptor = descriptor

    @property
    def is_held(self) -> bool:
        """Whether the folder is ours alone; False where it could not be locked."""
        return self._descriptor is not None

    def release(self) -> None:
        """Let go; a second time does nothing."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


def _sign(descriptor: int) -> None:
    """Say in the file who holds it."""
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    with suppress(OSError):  # a full disk costs the others a name, no more
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)


def _owner(descriptor: int) -> str:
    try:
        about: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {about['pid']} on host {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):  # it is just signing
        return "another process"
