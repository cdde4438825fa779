"""Doors: a prize behind one of K doors, N threads with T tries each, verdicts by the environment (LACE.md §8).

The prize cannot be inferred from the prompt, so threads that do not read each other are bound by a theorem
(:meth:`Doors.success_ceiling`; proof in ``docs/puzzles.md``). Anything above it is information flow between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lace_lightning.decoding.environment import FREE, Environment
from lace_lightning.puzzles.division import Attempt, assess, divide_search
from lace_lightning.puzzles.word_puzzle import HIT, MISS, WordPuzzle, check_sizes
from lace_lightning.tasks import Verdict
from lace_lightning.traces.schema import Problem, Tag, Trace, TraceThread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lace_lightning.decoding.group import Thread

TOKENS_PER_TRY = 3  # proposal, commitment, verdict


class Doors(WordPuzzle):
    """Find the prize: per try a thread writes a proposal and a commitment, and the environment writes hit or miss.

    Args:
        doors: numbers of doors K; each problem draws one. They stand in the prompt.
        tries: numbers of tries T; each problem draws one. They stand in the prompt.
        max_doors: largest number in the vocabulary; leaves room for sizes that were not trained on.
        seed: problems and traces are a function of (seed, split, index).

    Raises:
        ValueError: a size is below 1 or above ``max_doors``.
    """

    def __init__(
        self, doors: Sequence[int] = (8,), tries: Sequence[int] = (2,), max_doors: int = 16, seed: int = 0
    ) -> None:
        super().__init__(["doors", "tries", *map(str, range(max_doors + 1))], seed)
        self.doors = doors
        self.tries = tries
        check_sizes("doors", self.doors, 1, max_doors)
        check_sizes("tries", self.tries, 1, max_doors)

    def problem(self, index: int, split: str = "train") -> Problem:
        rng = self._random(split, index)
        doors, tries = rng.choice(self.doors), rng.choice(self.tries)
        prize = rng.randint(1, doors)
        return Problem(
            id=f"doors-{split}-{index}",
            text=f"doors {doors} tries {tries}",
            answer=str(prize),
            facts={"doors": doors, "tries": tries, "prize": prize},
            source="doors",
        )

    def trace(self, index: int, num_threads: int, split: str = "train") -> Trace:
        """Threads of :func:`divide_search`; index decides who gives way, so never shuffle them afterwards."""
        problem, rng = self.problem(index, split), self._random(split, index, num_threads)
        doors, tries, prize = (problem.facts[key] for key in ("doors", "tries", "prize"))
        attempts = divide_search(range(1, doors + 1), {prize}, num_threads, tries, rng)
        threads = [_render(own, tag) for own, tag in zip(attempts, assess(attempts), strict=True)]
        return Trace(problem, tuple(threads))

    def environment(
        self, problems: Sequence[Problem], num_threads: int, tokenizer: PreTrainedTokenizerBase
    ) -> DoorsEnvironment:
        """The verdicts of one batch of groups.

        Raises:
            ValueError: the tokenizer lacks a word of this puzzle.
        """
        ids = tokenizer.get_vocab()
        unknown = [word for word in self.words if word not in ids]
        if unknown:
            raise ValueError(f"the tokenizer lacks the words {unknown} of Doors: use the puzzle's own tokenizer()")
        return DoorsEnvironment(
            prizes=torch.tensor([ids[problem.answer] for problem in problems]),
            tries=torch.tensor([problem.facts["tries"] for problem in problems]),
            num_threads=num_threads,
            hit=ids[HIT],
            miss=ids[MISS],
        )

    def judge(self, items: Sequence[tuple[Problem, Thread]]) -> list[Verdict]:
        """Correct is the prize's door *and* an own hit: adopting another thread's find does not count."""
        return [_judge(problem, thread) for problem, thread in items]

    def success_ceiling(self, problem: Problem, num_threads: int) -> float:
        """1 - (1 - T/K)^N; proof in ``docs/puzzles.md``."""
        return 1 - (1 - min(problem.facts["tries"] / problem.facts["doors"], 1)) ** num_threads


class DoorsEnvironment(Environment):
    """Writes a verdict after the commitment of each of the first T tries of every thread.

    Args:
        prizes: (B,) long, token id of the winning door.
        tries: (B,) long, T.
        num_threads: N.
        hit, miss: token ids of the verdicts. Whatever is not the prize's word is a miss.
    """

    def __init__(self, prizes: torch.Tensor, tries: torch.Tensor, num_threads: int, hit: int, miss: int) -> None:
        self._prizes = prizes[:, None]
        self._last = tries[:, None] * TOKENS_PER_TRY
        self._count = torch.zeros(len(prizes), num_threads, dtype=torch.long)
        self._hit, self._miss = hit, miss

    def step(self, tokens: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        if self._count.device != tokens.device:
            self._prizes, self._last, self._count = (
                tensor.to(tokens.device) for tensor in (self._prizes, self._last, self._count)
            )
        self._count += written
        is_due = written & (self._count % TOKENS_PER_TRY == TOKENS_PER_TRY - 1) & (self._count < self._last)
        return torch.where(is_due, torch.where(tokens == self._prizes, self._hit, self._miss), FREE)


def _render(attempts: list[Attempt[int]], tag: Tag) -> TraceThread:
    """The thread's text with the spans of its verdicts; its answer is its last door, the prize's if it found it."""
    text, forced = "", []
    for proposed, committed, is_hit in attempts:
        text += f"{proposed} {committed} "
        verdict = HIT if is_hit else MISS
        forced.append((len(text), len(text) + len(verdict)))
        text += f"{verdict} "
    answer = str(attempts[-1].committed)
    return TraceThread(text.rstrip(), answer, tag, origin="doors oracle", forced=tuple(forced))


def _judge(problem: Problem, thread: Thread) -> Verdict:
    if thread.answer not in [str(door) for door in range(1, problem.facts["doors"] + 1)]:
        return Verdict.UNPARSABLE
    is_correct = thread.answer == problem.answer and HIT in thread.observations
    return Verdict.CORRECT if is_correct else Verdict.WRONG
