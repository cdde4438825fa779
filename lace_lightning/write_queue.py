"""Checkpoints that are written, and old ones removed, while training goes on: in order, and none after a failure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class WriteQueue:
    """One thread that works off what is added.

    After a failure it does nothing more: an old checkpoint whose successor could not be written is not removed.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()
        self._has_failed = False

    def add(self, work: Callable[..., Any], *args: Any) -> None:
        """Do this after all that was added before."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending.append(self._executor.submit(self._do, work, *args))

    def settle(self, left: int = 0) -> None:
        """Wait until no more than ``left`` things are to be done; raise what the others raised."""
        while len(self._pending) > left:
            self._pending.popleft().result()

    def close(self) -> None:
        """Do everything, end the thread, and raise what failed; it can be used again."""
        try:
            self.settle()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
            self._executor, self._has_failed = None, False
            self._pending.clear()

    def _do(self, work: Callable[..., Any], *args: Any) -> None:
        if self._has_failed:
            return
        try:
            work(*args)
        except BaseException:
            self._has_failed = True
            raise
