"""Whether an answer means the same as its reference: at sight where that is sure, else by math-verify in a worker."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lace_lightning.tasks import Verdict
from lace_lightning.verification.pool import PoolCounts, WorkerPool
from lace_lightning.verification.reference import Reference
from lace_lightning.verification.sight import Question, look

MEMORY_LIMIT = 2 * 1024**3
"""Bytes of address space for one worker, where the platform can limit it."""

log = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("worker.py")


class Verifier:
    """Compares answers with references, in worker processes that are killed and replaced when they hang.

    Words, letters, Countdown expressions and plain numbers are compared right here, with bounded effort; whatever needs
    a parser of mathematics goes to the workers. Usable as a context manager; the workers start with the first answer
    that needs them and end with :meth:`close` or with this process.

    Args:
        num_workers: number of worker processes.
        time_limit: seconds of processor time for one answer; one that takes longer is unparsable.

    Raises:
        ValueError: no workers, or no time.
    """

    def __init__(self, num_workers: int = 2, time_limit: float = 5.0) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers={num_workers}: verification needs at least 1 worker process")
        if not 0 < time_limit < math.inf:
            raise ValueError(f"time_limit={time_limit}: give the seconds for one answer, more than 0 and finite")
        self.num_workers = num_workers
        self.time_limit = time_limit
        orphan_limit = 2 * time_limit + 1  # later than the pool, which kills at time_limit
        command = [sys.executable, "-P", str(_WORKER), str(MEMORY_LIMIT), str(orphan_limit)]
        self._pool = WorkerPool(command, num_workers, time_limit)

    def verify(self, pairs: Sequence[tuple[Reference | str, str | None]]) -> list[Verdict]:
        """Judge answers against their references; never raises on any text.

        Args:
            pairs: ``(reference, answer)``; a plain string is the reference of an expression. The answer is None where
                there is none.

        Returns:
            One verdict per pair, in order. An answer is ``UNPARSABLE`` if it is missing, overlong or not readable
            (:func:`~lace_lightning.verification.spelling.is_readable`), not of the reference's kind, or took too long
            or too much memory to compare. :attr:`counts` tells the last two apart, and a warning counts them. A worker
            that stalls or is killed by others is no fault of its answer, which is compared again.

        Raises:
            RuntimeError: math-verify is not installed; :class:`~lace_lightning.verification.pool.WorkersFailed`: the
                worker processes can't be started, or are stopped or killed again and again.
        """
        asked = [(Reference(gold) if isinstance(gold, str) else gold, answer) for gold, answer in pairs]
        seen = {pair: look(*pair) for pair in asked}
        unclear = {pair: question for pair, question in seen.items() if isinstance(question, Question)}
        verdicts = {pair: verdict for pair, verdict in seen.items() if isinstance(verdict, Verdict)}
        verdicts |= zip(unclear, self._ask(list(unclear.values())), strict=True)
        return [verdicts.get(pair, Verdict.UNPARSABLE) for pair in asked]

    @property
    def counts(self) -> PoolCounts:
        """What became of the workers since the first answer."""
        return self._pool.counts

    @property
    def _num_expensive(self) -> int:
        return self.counts.timeouts + self.counts.crashes

    def close(self) -> None:
        """End the worker processes; a later :meth:`verify` starts new ones."""
        self._pool.close()

    def _ask(self, questions: list[Question]) -> list[Verdict]:
        if questions and find_spec("math_verify") is None:
            raise RuntimeError(
                "answers of mathematics need math-verify, which is not installed: pip install math-verify"
            )
        before = self._num_expensive
        replies = self._pool.map([asdict(question) for question in questions])
        if self._num_expensive.bit_length() > before.bit_length():  # the 1st, 2nd, 4th, 8th …
            log.warning(
                "%d answers so far used up time_limit=%g s of processor time or %d GiB of memory. They count as "
                "unparsable, hence not as correct; if they look right to you, raise time_limit.",
                self._num_expensive, self.time_limit, MEMORY_LIMIT // 1024**3,
            )  # fmt: skip
        return [Verdict(reply or Verdict.UNPARSABLE) for reply in replies]

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles get workers of their own."""
        return Verifier, (self.num_workers, self.time_limit)
