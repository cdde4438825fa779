"""Choosing among threads: votes, claims and certainty. Threads without an answer are never chosen."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from lace_lightning.decoding.group import Thread
from lace_lightning.evaluation.methods.record import Record, answer_of
from lace_lightning.traces.schema import Tag

_WHOLE = re.compile("[0-9]{1,4}")
_DECIMAL = re.compile(r"[0-9]{1,4}(\.[0-9]{1,9})?")
_BRANCH = re.compile(r"\bbranch\b:?[ \t]*(.*?)[ \t]*(?=\bbranch\b|\n|$)", re.IGNORECASE)


def vote(record: Record, voters: Sequence[int], weights: Mapping[int, float] | None = None) -> tuple[int | None, float]:
    """The first voter for the answer with the most votes, and its share of all of them.

    As ``vote_at_n``: answers are compared as stripped text, and of equally frequent ones the first given wins. Voters
    without an answer count as votes for nobody.

    Args:
        record: whose passages vote.
        voters: indices of passages, in order.
        weights: of each voter, not negative; None: one each.

    Returns:
        The index of a passage and a share in 0 … 1; None and 0 if nobody has an answer.
    """
    weight = dict.fromkeys(voters, 1.0) if weights is None else weights
    votes: Counter[str] = Counter()
    for index in voters:
        if answer := answer_of(record.thread(index)):
            votes[answer] += weight[index]  # type: ignore[assignment]  # a counter adds up any numbers
    if not votes:
        return None, 0.0
    winner, count = votes.most_common(1)[0]
    total = sum(weight[index] for index in voters)
    first = next(index for index in voters if answer_of(record.thread(index)) == winner)
    return first, count / total if total else 0.0


def claiming(record: Record, indices: Sequence[int]) -> list[int]:
    """Those whose threads claim success; all of them if none does."""
    return [index for index in indices if claims(record.thread(index))] or [*indices]


def claims(thread: Thread) -> bool:
    """Whether a thread says of itself that it found an answer."""
    return thread.tag in (Tag.BEST, Tag.SUCCESS) and bool(answer_of(thread))


def certainty(thread: Thread) -> float:
    """Geometric mean probability of the tokens that the thread chose, 0 … 1."""
    own = own_logprobs(thread)
    return math.exp(sum(own) / len(own)) if own else 0.0


def own_logprobs(thread: Thread) -> list[float]:
    """Log-probabilities of what the thread chose itself, in order."""
    return [logprob for logprob, forced in zip(thread.logprobs, thread.forced, strict=True) if not forced]


def parse_index(thread: Thread, count: int) -> int | None:
    """A judge's answer 1 … ``count`` as an index from 0; None if it is nothing of the kind."""
    answer = answer_of(thread)
    return int(answer) - 1 if _WHOLE.fullmatch(answer) and 1 <= int(answer) <= count else None


def parse_rating(thread: Thread) -> float | None:
    """A rating from 0 to 10, as 0 … 1; None if it is nothing of the kind."""
    answer = answer_of(thread)
    return float(answer) / 10 if _DECIMAL.fullmatch(answer) and float(answer) <= 10 else None


def parse_headings(thread: Thread) -> list[str]:
    """What branches a plan opens: what stands after each word ``branch``, up to the next or the end of the line.

    Empty headings and repeated ones are left out.
    """
    return [*dict.fromkeys(heading for heading in _BRANCH.findall(thread.thought) if heading)]
