"""Whether an answer means the same as the reference, by symbolic comparison with math-verify."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lace_lightning.tasks import Verdict
from lace_lightning.verification.pool import WorkerPool

MAX_LENGTH = 1000
"""Longest text in characters that is compared; the longest reference of our data sets has 198."""

MEMORY_LIMIT = 2 * 1024**3
"""Bytes of address space for one worker, where the platform can limit it."""

_WORKER = Path(__file__).with_name("worker.py")
_INTEGER = re.compile(r"-?[0-9]{1,12}")


class Verifier:
    """Compares answers with references in worker processes, which are killed and replaced when they hang.

    An answer counts if math-verify finds it equal to the reference, both read as LaTeX or plain mathematics. Plain
    integers are compared right here, with the same outcome. Usable as a context manager; the workers start with the
    first answer that needs them and end with :meth:`close` or with this process.

    Args:
        num_workers: number of worker processes.
        time_limit: seconds for one answer; one that takes longer is unparsable.

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

    def verify(self, pairs: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        """Judge answers against their references; never raises on any text.

        Args:
            pairs: ``(reference, answer)``; the answer is None where there is none.

        Returns:
            One verdict per pair, in order. An answer is ``UNPARSABLE`` if it is missing, overlong
            (:data:`MAX_LENGTH`), no mathematics where the reference is, or took too long to compare. A reference that
            is no mathematics is compared as text.

        Raises:
            RuntimeError: the worker processes can't be started.
        """
        verdicts = {pair: _verdict_at_sight(*pair) for pair in pairs}
        unclear = [pair for pair, verdict in verdicts.items() if verdict is None]
        replies = self._pool.map(unclear)
        verdicts |= {pair: Verdict(reply or Verdict.UNPARSABLE) for pair, reply in zip(unclear, replies, strict=True)}
        return [verdicts[pair] or Verdict.UNPARSABLE for pair in pairs]

    def close(self) -> None:
        """End the worker processes; a later :meth:`verify` starts new ones."""
        self._pool.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles get workers of their own."""
        return Verifier, (self.num_workers, self.time_limit)


def _verdict_at_sight(reference: str, answer: str | None) -> Verdict | None:
    """The verdict if it needs no parser, else None."""
    if answer is None or not answer.strip() or max(len(reference), len(answer)) > MAX_LENGTH:
        return Verdict.UNPARSABLE
    if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(answer):
        return Verdict.CORRECT if int(reference) == int(answer) else Verdict.WRONG
    return None
