"""A pool of processes that may hang or die without taking more than their own job with them."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from lace_lightning.verification.worker_process import STANDSTILL, WorkerProcess

MAX_FAILED_STARTS = 3
"""Starts in a row that may fail: one may be bad luck, such as a machine short of memory."""

MAX_ATTEMPTS = 3
"""Times that a job is begun whose worker comes to a standstill or is killed by others."""


class WorkersFailed(RuntimeError):
    """Workers do not start, or none comes to an end with a job, through no fault of the job."""


@dataclass(frozen=True)
class PoolCounts:
    """What became of the workers.

    Args:
        timeouts: jobs that used up the time limit; their worker was killed.
        crashes: jobs whose worker died of them.
        starts: workers that were started.
        retries: jobs that were begun again, since their worker stood still or was killed by others.
    """

    timeouts: int = 0
    crashes: int = 0
    starts: int = 0
    retries: int = 0


class WorkerPool:
    """Sends JSON values to worker processes, one at a time each, and kills those that take too long.

    Workers are programs of their own, not forks or spawned copies of this one: they inherit no GPU memory and no
    locks, need no ``if __name__ == "__main__"`` in the user's script, and Ctrl-C in the terminal doesn't reach them.
    They start with the first job and end with the pool, at the latest with this process.

    A job pays for what it uses itself, processor time and memory. What the machine does to a worker (a stall, a kill)
    is no fault of the job, which is begun again.

    Args:
        command: the worker program. It writes one line when it is ready and then one JSON line for every line that it
            reads; it ends when its input ends.
        num_workers: number of processes.
        time_limit: seconds of processor time for one job.

    Attributes:
        counts: what became of the workers so far.
    """

    def __init__(self, command: Sequence[str], num_workers: int, time_limit: float) -> None:
        self.command = list(command)
        self.num_workers = num_workers
        self.time_limit = time_limit
        self.counts = PoolCounts()
        self._workers: list[WorkerProcess] = []
        self._failed_starts = 0
        self._attempts: Counter[int] = Counter()  # by job
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _discard_all, self._workers)  # runs at exit, too

    def map(self, jobs: Sequence[Any]) -> list[Any | None]:
        """Replies to the jobs, in order; None where a job used up its time or its worker died of it.

        Raises:
            WorkersFailed: :data:`MAX_FAILED_STARTS` workers in a row ended, or were silent for
                :data:`~lace_lightning.verification.worker_process.START_LIMIT`, before they were ready; or
                :data:`MAX_ATTEMPTS` of them stood still or were killed with the same job.
        """
        replies: list[Any | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        with self._lock:
            self._attempts.clear()
            try:
                while waiting or any(worker.job is not None for worker in self._workers):
                    self._assign(jobs, waiting)
                    self._collect(replies, waiting)
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
            self._workers.append(WorkerProcess(self.command))
            self._count(starts=1)
        for worker in [worker for worker in self._workers if worker.is_idle]:
            if not waiting:
                return
            try:
                worker.send(waiting[0], jobs[waiting[0]], self.time_limit)
                waiting.popleft()
            except BrokenPipeError:  # it died between two jobs
                self._discard(worker)

    def _collect(self, replies: list[Any | None], waiting: deque[int]) -> None:
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
            elif not is_alive or worker.is_overdue():
                self._discard(worker)
                self._account(worker, waiting)

    def _account(self, worker: WorkerProcess, waiting: deque[int]) -> None:
        """Say whose fault the end of a worker was; a job that had none goes back to the front."""
        if worker.job is None:
            self._count_failed_start()
        elif worker.fate == "used up":
            self._count(timeouts=1)
        elif worker.fate == "died":
            self._count(crashes=1)
        else:
            self._attempts[worker.job] += 1
            if self._attempts[worker.job] == MAX_ATTEMPTS:
                raise WorkersFailed(
                    f"{MAX_ATTEMPTS} worker processes in a row stood still for {STANDSTILL:g} s or were killed by "
                    "others in the middle of one job, so there is no reply to it. Is the machine short of memory "
                    "(see its kernel log), or are its processes being stopped?"
                )
            self._count(retries=1)
            waiting.appendleft(worker.job)

    def _count(self, timeouts: int = 0, crashes: int = 0, starts: int = 0, retries: int = 0) -> None:
        old = self.counts
        self.counts = PoolCounts(
            old.timeouts + timeouts, old.crashes + crashes, old.starts + starts, old.retries + retries
        )

    def _count_failed_start(self) -> None:
        self._failed_starts += 1
        if self._failed_starts == MAX_FAILED_STARTS:
            self._failed_starts = 0
            raise WorkersFailed(
                f"{MAX_FAILED_STARTS} worker processes in a row ended or were silent before they were ready: run the "
                f"command {' '.join(self.command)!r} to see why"
            )

    def _discard(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        worker.kill()


def _discard_all(workers: list[WorkerProcess]) -> None:
    while workers:
        workers.pop().kill()
