"""A pool of processes that may hang or die without taking more than their own job with them."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

START_LIMIT = 120.0
"""Seconds that a worker may take to start: the imports, on a busy machine."""

MAX_FAILED_STARTS = 3
"""Starts in a row that may fail: one may be bad luck, such as a machine short of memory."""


@dataclass(frozen=True)
class PoolCounts:
    """What became of the workers.

    Args:
        timeouts: jobs that took longer than the time limit; their worker was killed.
        crashes: jobs whose worker died.
        starts: workers that were started.
    """

    timeouts: int = 0
    crashes: int = 0
    starts: int = 0


class WorkerPool:
    """Sends JSON values to worker processes, one at a time each, and kills those that take too long.

    Workers are programs of their own, not forks or spawned copies of this one: they inherit no GPU memory and no
    locks, need no ``if __name__ == "__main__"`` in the user's script, and Ctrl-C in the terminal doesn't reach them.
    They start with the first job and end with the pool, at the latest with this process.

    Args:
        command: the worker program. It writes one line when it is ready and then one JSON line for every line that it
            reads; it ends when its input ends.
        num_workers: number of processes.
        time_limit: seconds for one job.

    Attributes:
        counts: what became of the workers so far.
    """

    def __init__(self, command: Sequence[str], num_workers: int, time_limit: float) -> None:
        self.command = list(command)
        self.num_workers = num_workers
        self.time_limit = time_limit
        self.counts = PoolCounts()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _discard_all, self._workers)  # runs at exit, too

    def map(self, jobs: Sequence[Any]) -> list[Any | None]:
        """Replies to the jobs, in order; None where a worker hung or died.

        Raises:
            RuntimeError: :data:`MAX_FAILED_STARTS` workers in a row ended, or were silent for :data:`START_LIMIT`,
                before they were ready.
        """
        replies: list[Any | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        with self._lock:
            try:
                while waiting or any(worker.job is not None for worker in self._workers):
                    self._assign(jobs, waiting)
                    self._collect(replies)
            except BaseException:  # a reply that comes later must not pass for that to another call's job
                self.close()
                raise
        return replies

    def close(self) -> None:
        """End all workers. The next job starts new ones."""
        _discard_all(self._workers)

    def _assign(self, jobs: Sequence[Any], waiting: deque[int]) -> None:
        unfinished = len(waiting) + sum(worker.job is not None for worker in self._workers)
        while len(self._workers) < min(self.num_workers, unfinished):
            self._workers.append(_Worker(self.command))
            self._count(starts=1)
        for worker in [worker for worker in self._workers if worker.is_idle]:
            if not waiting:
                return
            try:
                worker.send(waiting[0], jobs[waiting[0]], self.time_limit)
                waiting.popleft()
            except BrokenPipeError:  # it died between two jobs
                self._discard(worker)

    def _collect(self, replies: list[Any | None]) -> None:
        pending = [worker for worker in self._workers if not worker.is_idle]
        if not pending:
            return
        patience = min(worker.deadline for worker in pending) - time.monotonic()
        readable = wait([worker.output for worker in pending], max(patience, 0.0))
        for worker in pending:
            is_alive = worker.output not in readable or worker.receive()
            if worker.has_replied:
                if worker.job is None:
                    self._failed_starts = 0
                else:
                    replies[worker.job] = worker.reply()
                worker.rest()
            elif not is_alive or time.monotonic() >= worker.deadline:
                self._discard(worker)
                if worker.job is None:
                    self._count_failed_start()
                else:
                    self._count(timeouts=int(is_alive), crashes=int(not is_alive))

    def _count(self, timeouts: int = 0, crashes: int = 0, starts: int = 0) -> None:
        old = self.counts
        self.counts = PoolCounts(old.timeouts + timeouts, old.crashes + crashes, old.starts + starts)

    def _count_failed_start(self) -> None:
        self._failed_starts += 1
        if self._failed_starts == MAX_FAILED_STARTS:
            self._failed_starts = 0
            raise RuntimeError(
                f"{MAX_FAILED_STARTS} worker processes in a row ended or were silent before they were ready: run the "
                f"command {' '.join(self.command)!r} to see why"
            )

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


class _Worker:
    """One process: starting, then by turns idle and busy with a job."""

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
        self._received = b""

    def send(self, index: int, job: Any, time_limit: float) -> None:
        """Begin a job.

        Raises:
            BrokenPipeError: the process has died.
        """
        self._input.write(json.dumps(job).encode() + b"\n")
        self._input.flush()
        self.job, self.is_idle = index, False
        self.deadline = time.monotonic() + time_limit

    def receive(self) -> bool:
        """Take what it has written so far; False if it has closed its output."""
        data = os.read(self.output, 4096)
        self._received += data
        return bool(data)

    @property
    def has_replied(self) -> bool:
        return self._received.endswith(b"\n")

    def reply(self) -> Any:
        return json.loads(self._received)

    def rest(self) -> None:
        self.job, self.is_idle, self._received = None, True, b""

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()  # reaps it and closes its pipes


def _discard_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
