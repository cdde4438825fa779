"""Ranks that outlive what launched them: a killed launcher must not leave processes that wait for it for ever."""

from __future__ import annotations

import os
import threading
import time

import psutil

GRACE_SECONDS = 15.0
"""After a launcher's end. At a normal end it is just ahead; the error of a broken collective says more than ours."""

LAUNCHER = "LACE_LAUNCHER"
"""Environment variable: process id of the ``lace`` that launched this one as a rank."""

_POLL_SECONDS = 1.0


def end_with_launcher(grace: float = GRACE_SECONDS) -> None:
    """In a process that was launched as one rank of several, watch the launcher and end when it has died.

    Lightning and torchrun name such a rank by LOCAL_RANK and end all ranks when one dies. When they are killed
    themselves, a rank that waits for the others to join, or in a collective on GPUs, would wait for half an hour.
    Elsewhere nothing is watched.

    Args:
        grace: seconds between the launcher's end and ours.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER] = str(os.getpid())  # Lightning may now launch the other ranks from here
        return
    threading.Thread(target=_watch, args=(_launcher(), grace), name="launcher-watch", daemon=True).start()


def _launcher() -> int:
    """Process id of the launcher: our parent, unless the ``lace`` that launched us died before we came here."""
    parent = os.getppid()
    lace = int(os.environ.get(LAUNCHER, parent))
    return parent if _is_alive(lace) else lace


def _is_alive(process: int) -> bool:
    """Whether it runs; one that was killed and that nobody has waited for yet does not."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _watch(launcher: int, grace: float) -> None:
    while os.getppid() == launcher:
        time.sleep(_POLL_SECONDS)
    time.sleep(grace)
    rank = os.environ["LOCAL_RANK"]
    os.write(2, f"lace: error: local rank {rank} ends: its launcher, process {launcher}, has died\n".encode())
    os._exit(1)
