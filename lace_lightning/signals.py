"""Signals that ask a process to stop: Ctrl-C, SIGTERM, and SIGUSR1, which SLURM sends before the time is up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(SystemExit):
    """Ends the process with the exit code that shells give to a signal: SIGINT 130, SIGUSR1 138, SIGTERM 143."""


@contextmanager
def stopping_anywhere() -> Iterator[None]:
    """Within the block the first such signal raises :class:`Interrupted` wherever the code is; a second exits at once.

    For what lasts long and has nothing to save, such as reading data and building a model. Outside of the main thread,
    signals do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    was_signalled = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal was_signalled
        if was_signalled:
            os._exit(128 + number)
        was_signalled = True
        raise Interrupted(128 + number)

    previous = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is handle:  # else somebody has set another since
                signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python
