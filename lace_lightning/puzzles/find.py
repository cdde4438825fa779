"""Find: threads look for x with a·x ≡ b (mod p), and compute and judge their own checks; there is no environment.

The prompt determines x, so a model may solve it alone: unlike in Doors, no ceiling holds for isolated threads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lace_lightning.puzzles.division import Attempt, assess, divide_search
from lace_lightning.puzzles.word_puzzle import HIT, MISS, SPLITS, WordPuzzle, check_sizes, split_of
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem, Trace, TraceThread

if TYPE_CHECKING:
    from lace_lightning.decoding.group import Thread

_NUMBER = re.compile("[0-9]{1,9}")


class Find(WordPuzzle):
    """Solve ``find a x = b mod p``: per try a thread writes a proposal, a commitment, a·x mod p, and hit or miss.

    Each (a, b, p) with 0 < a, b < p belongs to the training or to the test split for ever, whatever the seed.

    Args:
        primes: values of p; the larger, the more triples there are.
        tries: candidates that each thread checks, T.
        max_number: largest number in the vocabulary, above every prime.
        seed: problems and traces are a function of (seed, split, index).

    Raises:
        ValueError: a value of ``primes`` is not a prime below ``max_number``, they leave a split without problems, or
            ``tries`` is below 1.
    """

    def __init__(
        self, primes: Sequence[int] = (7, 11, 13), tries: int = 2, max_number: int = 32, seed: int = 0
    ) -> None:
        super().__init__(["find", "x", "=", "mod", *map(str, range(max_number + 1))], seed)
        self.primes = primes
        self.tries = tries
        check_sizes("primes", self.primes, 2, max_number)
        check_sizes("tries", [tries], 1, max_number)
        composite = [p for p in self.primes if any(p % divisor == 0 for divisor in range(2, p))]
        if composite:
            raise ValueError(f"primes={self.primes}: {composite} are not prime, so a x = b may have no solution")
        self._triples: dict[str, list[tuple[int, int, int]]] = {split: [] for split in SPLITS}
        for p in sorted(set(self.primes)):
            for a in range(1, p):
                for b in range(1, p):
                    self._triples[split_of(f"find {a} {b} {p}")].append((a, b, p))
        if not all(self._triples.values()):
            raise ValueError(f"primes={self.primes} leave a split without problems: add a larger prime")

    def problem(self, index: int, split: str = "train") -> Problem:
        rng = self._random(split, index)
        a, b, p = rng.choice(self._triples[split])
        return Problem(
            id=f"find-{split}-{index}",
            text=f"find {a} x = {b} mod {p}",
            answer=str(pow(a, -1, p) * b % p),
            facts={"a": a, "b": b, "p": p},
            source="find",
        )

    def trace(self, index: int, num_threads: int, split: str = "train") -> Trace:
        """Threads of :func:`divide_search`; index decides who gives way, so never shuffle them afterwards."""
        problem, rng = self.problem(index, split), self._random(split, index, num_threads)
        a, p = problem.facts["a"], problem.facts["p"]
        attempts = divide_search(range(1, p), {int(problem.answer)}, num_threads, self.tries, rng)
        threads = [
            TraceThread(_render(own, a, p), str(own[-1].committed), tag, origin="find oracle")
            for own, tag in zip(attempts, assess(attempts), strict=True)
        ]
        return Trace(problem, tuple(threads))

    def judge(self, items: Sequence[tuple[Problem, Thread]]) -> list[Verdict]:
        """Correct is any number that satisfies the congruence, not only the reference answer."""
        return [_judge(problem, thread) for problem, thread in items]


def _render(attempts: list[Attempt[int]], a: int, p: int) -> str:
    return " ".join(
        f"{proposed} {committed} {a * committed % p} {HIT if is_hit else MISS}"
        for proposed, committed, is_hit in attempts
    )


def _judge(problem: Problem, thread: Thread) -> Verdict:
    if thread.answer is None or not _NUMBER.fullmatch(thread.answer):
        return Verdict.UNPARSABLE
    facts = problem.facts
    is_solution = int(thread.answer) * facts["a"] % facts["p"] == facts["b"] % facts["p"]
    return Verdict.CORRECT if is_solution else Verdict.WRONG
