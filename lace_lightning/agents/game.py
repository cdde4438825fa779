"""A game as its players see it: a function from the commands so far to what the game says."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MAX_TEXT = 400
"""Characters of an observation; what a game says beyond them is not shown."""


class Status(StrEnum):
    """How a thread's game stands. ``OVER``: it has used up its commands without an end."""

    RUNNING = ""
    WON = "won"
    LOST = "lost"
    OVER = "over"


@dataclass(frozen=True)
class Turn:
    """What a game says after a command.

    Args:
        text: the observation.
        score: points so far.
        status: whether the game is won or lost.
        admissible: commands that the game would take next; none if it has ended.
    """

    text: str
    score: int
    status: Status = Status.RUNNING
    admissible: tuple[str, ...] = ()


@dataclass(frozen=True)
class Standing:
    """Points and status that an observation closes with."""

    score: int
    status: Status


class Game(ABC):
    """A deterministic game: threads that have given the same commands stand at the same place.

    So a thread's copy of a game is the list of its commands, and any number of threads can share one object.

    Attributes:
        max_score: points of a perfect game, at least 1.
    """

    max_score: int

    @abstractmethod
    def after(self, commands: Sequence[str]) -> Turn:
        """How the game stands after ``commands``, with what it answered to the last of them.

        A command that the game does not take costs a turn and changes nothing; no text makes this raise.
        """


_UNSAFE = re.compile(r"[^\w\s.,:!?'()=+/-]|_")
_STANDING = re.compile(r"\[([0-9]{1,6})(?::(won|lost|over))?\]")


def spell(text: str, score: int, status: Status) -> str:
    """An observation as it is written into a thread: plain text of bounded length, then the standing.

    The game's own text loses brackets and all signs that open an assessment, a command or a special token.
    """
    plain = " ".join(_UNSAFE.sub(" ", text).split())[:MAX_TEXT]
    return f"{plain} {standing_word(score, status)}"


def standing_word(score: int, status: Status) -> str:
    """``[2]`` while the game runs, ``[3:won]`` and so on after its end."""
    return f"[{score}:{status}]" if status else f"[{score}]"


def last_standing(observations: Sequence[str]) -> Standing:
    """Points and status by what the environment wrote last; nothing at all is no points in a running game."""
    found = [match for observation in observations for match in _STANDING.finditer(observation)]
    return Standing(int(found[-1][1]), Status(found[-1][2] or "")) if found else Standing(0, Status.RUNNING)
