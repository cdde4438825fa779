"""How Countdown asks follow-up questions in the words of its closed vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from lace_lightning.puzzles.word_puzzle import WordPuzzle
from lace_lightning.tasks import FollowUp

RATINGS = ("0", "10")
"""What RATE is answered with: the target cannot be reached any more, or it can."""


def word_follow_up(kind: FollowUp, problem: str, texts: Sequence[str], max_words: int) -> str:
    """``30 100 93 -> 23 judge 1 … , 2 …``: the problem, the kind, and the thoughts of ``texts``.

    >>> word_follow_up(FollowUp.STEP, "30 100 93 -> 23", ["100 - 93 = 7 ; [[success]]"], 14)
    '30 100 93 -> 23 step 100 - 93 = 7'
    >>> word_follow_up(FollowUp.JUDGE, "30 100 93 -> 23", ["ab+ ab+ 30", "bc-"], 14)
    '30 100 93 -> 23 judge 1 ab+ ab+ 30 , 2 bc-'

    Args:
        kind: what is asked.
        problem: the problem's own text.
        texts: those that go with ``kind``; only what stands before the assessment is shown.
        max_words: of each text at most so many words are shown.
    """
    thoughts = [_thought(text, max_words) for text in texts]
    if kind is FollowUp.JUDGE:
        thoughts = [f"{number} {thought}" for number, thought in enumerate(thoughts, start=1)]
    return f"{problem} {kind} {' , '.join(thoughts)}".rstrip()


def _thought(text: str, max_words: int) -> str:
    return " ".join(text.partition(WordPuzzle.template.opening)[0].split()[:max_words])
