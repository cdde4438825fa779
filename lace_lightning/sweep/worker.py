"""Who runs a trial: enough about a process to see from the same machine whether it still lives."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_worker() -> dict[str, Any]:
    """This process, as JSON values."""
    process = psutil.Process()
    return {"host": _host(), "pid": process.pid, "started": process.create_time()}


def _host() -> str:
    """This machine, and which of its containers: process ids mean something in there alone.

    Many machines may have one name, and the outermost container has one number everywhere: what tells them apart is
    Linux's random name of this boot.
    """
    space = Path("/proc/self/ns/pid")
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
    return f"{platform.node()} {boot} {os.readlink(space) if space.is_symlink() else ''}".strip()


def is_dead(worker: Mapping[str, Any] | None) -> bool:
    """Whether a worker of this machine is gone; of others nothing is known."""
    if worker is None or worker["host"] != _host():
        return False
    try:
        return abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) > 1
    except psutil.NoSuchProcess:
        return True
