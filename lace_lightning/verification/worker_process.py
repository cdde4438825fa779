"""One worker as its pool sees it: a program that is given a job, and whose time on it is watched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import Any, Literal

import psutil

START_LIMIT = 120.0
"""Seconds that a worker may take to start: the imports, on a busy machine."""

STANDSTILL = 10.0
"""Seconds without any use of the processor after which a worker with a job is taken for stopped."""

_KILLED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT}
"""Exit codes of workers that somebody else ended: the system short of memory, an operator."""


class WorkerProcess:
    """One process: starting, then by turns idle and busy with a job.

    Args:
        command: the worker program, of which :class:`~lace_lightning.verification.pool.WorkerPool` says what it does.

    Attributes:
        output: file descriptor to wait on.
        job: number of the job that it is busy with; None while it has none.
        is_idle: it waits for a job.
        deadline: when to look again whether it is overdue, by the monotonic clock.
        fate: how it ended, once it was killed.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input = self._process.stdin
        self.output = self._process.stdout.fileno()
        self.job: int | None = None
        self.is_idle = False
        self.deadline = time.monotonic() + START_LIMIT
        self.fate: Literal["used up", "stood still", "died", "was killed"] = "died"
        self._clock = psutil.Process(self._process.pid)
        self._received = b""

    def send(self, index: int, job: Any, time_limit: float) -> None:
        """Begin a job.

        Args:
            index: its number, kept as ``job``.
            job: a JSON value.
            time_limit: seconds of processor time.

        Raises:
            BrokenPipeError: the process has died.
        """
        self._input.write(json.dumps(job).encode() + b"\n")
        self._input.flush()
        self.job, self.is_idle = index, False
        self.deadline = time.monotonic() + time_limit
        self._budget = self._used() + time_limit
        self._moved = self._used(), time.monotonic()

    def is_overdue(self) -> bool:
        """Whether it has used up its processor time, or has long used none; of a starting one, its time to start."""
        now, used = time.monotonic(), self._used()
        if now < self.deadline:
            return False
        if self.job is None:
            return True
        if used > self._moved[0]:
            self._moved = used, now
        if used >= self._budget:
            self.fate = "used up"
        elif now >= self._moved[1] + STANDSTILL:
            self.fate = "stood still"
        else:
            self.deadline = now + min(max(self._budget - used, 0.02), 1.0)
            return False
        return True

    def receive(self) -> bool:
        """Take what it has written so far; False if it has closed its output."""
        data = os.read(self.output, 4096)
        self._received += data
        if not data:
            with suppress(subprocess.TimeoutExpired):  # its end may be a moment away
                self._process.wait(1.0)
        return bool(data)

    @property
    def has_replied(self) -> bool:
        """Whether a whole line has come: its reply, or that it is ready."""
        return self._received.endswith(b"\n")

    def reply(self) -> Any:
        """The JSON value of the line."""
        return json.loads(self._received)

    def rest(self) -> None:
        """Be idle; what was received is forgotten."""
        self.job, self.is_idle, self._received = None, True, b""

    def kill(self) -> None:
        """End it, and note whether somebody else had done so before."""
        if self._process.poll() in _KILLED:
            self.fate = "was killed"
        self._process.kill()
        self._process.communicate()  # reaps it and closes its pipes

    def _used(self) -> float:
        """Seconds of processor time so far."""
        try:
            times = self._clock.cpu_times()
        except psutil.Error:  # it is dead, which its output tells
            return 0.0
        return times.user + times.system
