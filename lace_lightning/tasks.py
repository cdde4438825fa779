"""A task: how problems of one kind are asked, played and judged. YAML chooses it by class path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from lace_lightning.traces.schema import Problem, Trace
from lace_lightning.traces.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lace_lightning.decoding.environment import Environment
    from lace_lightning.decoding.group import Thread


class Verdict(StrEnum):
    """Outcome of judging one thread. ``UNPARSABLE`` (no or unreadable answer) counts as not correct, but apart."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"


class FollowUp(StrEnum):
    """What a model may be asked about a problem besides solving it; methods that baselines need ask these.

    The texts that go with each: ``STEP`` (steps so far): write the next step only. ``RATE`` (steps so far): how
    promising is this. ``REFINE`` (earlier attempts, oldest first): improve on the last. ``JUDGE`` (candidates): which
    one is right. ``MERGE`` (paths): read them all and answer. ``FORK`` (none): open branches. ``BRANCH`` (the heading
    of one branch): work it out.
    """

    STEP = "step"
    RATE = "rate"
    REFINE = "refine"
    JUDGE = "judge"
    MERGE = "merge"
    FORK = "fork"
    BRANCH = "branch"


class Task(ABC):
    """Asks, plays and judges problems.

    Attributes:
        template: how prompts and threads are spelled.
    """

    template: Template

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The task's own tokenizer, for puzzles with a closed vocabulary; None where the model brings one."""
        return None

    def environment(
        self, problems: Sequence[Problem], num_threads: int, tokenizer: PreTrainedTokenizerBase
    ) -> Environment | None:
        """A fresh environment for one batch of groups, or None where threads are alone with their thoughts."""
        return None

    def adapt(self, problem: Problem) -> Problem:
        """A problem read from a file, worded the way this task asks it."""
        return problem

    def follow_up(self, kind: FollowUp, problem: Problem, texts: Sequence[str]) -> str:
        """The text to put in place of the problem's own, before the template, to ask ``kind`` about it.

        Raises:
            ValueError: this task has no wording for it.
        """
        raise ValueError(f"{type(self).__name__} has no wording for {kind.value!r}: leave out the methods that ask it")

    @abstractmethod
    def judge(self, items: Sequence[tuple[Problem, Thread]]) -> list[Verdict]:
        """Judge threads, in order; never raises on any text that a model may write."""

    def success_ceiling(self, problem: Problem, num_threads: int) -> float | None:
        """Highest best@N that exchangeable threads that cannot read each other can reach, if a theorem gives one."""
        return None


class Puzzle(Task):
    """A task that makes its own problems and oracle traces, deterministically from (seed, index)."""

    @abstractmethod
    def problem(self, index: int, split: str = "train") -> Problem:
        """Problem number ``index`` of a split (``"train"`` or ``"test"``); the same for ever."""

    @abstractmethod
    def trace(self, index: int, num_threads: int, split: str = "train") -> Trace:
        """Oracle trace of ``problem(index, split)`` with ``num_threads`` threads; the same for ever."""
