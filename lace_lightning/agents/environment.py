"""Threads that play: commands out of what a thread writes, and the game's answers into it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from lace_lightning.agents.game import Game, Status, spell
from lace_lightning.decoding.environment import FREE, Environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_COMMAND = 100
"""Characters of a command."""
MAX_PENDING = 256
"""Tokens since the last observation in which a command is looked for."""


@dataclass(frozen=True)
class Framing:
    """How a command stands in a thread's text: between the last ``begin`` and the ``end`` that follows it.

    Whatever a thread writes before is its own thought, and no command.
    """

    begin: str = ">"
    end: str = "."

    def command(self, text: str) -> str | None:
        """The command that ``text`` closes with, or None while there is none."""
        _, begun, rest = text.rpartition(self.begin)
        if not begun or self.end not in rest:
            return None
        return " ".join(rest.partition(self.end)[0].split())[:MAX_COMMAND]


class GameEnvironment(Environment):
    """Lets each of N threads play its own copy of its group's game until it is won, lost or out of commands.

    A thread that has completed a command reads the game's answer in the columns that follow; the answer to its last
    command closes with the outcome. Later commands get no answer.

    Args:
        games: B games.
        limits: (B) commands that each thread may give.
        num_threads: N.
        tokenizer: of the threads.
        framing: how commands are written.

    Raises:
        ValueError: there is not one limit for every game, or a limit is below 1.
    """

    def __init__(
        self,
        games: Sequence[Game],
        limits: Sequence[int],
        num_threads: int,
        tokenizer: PreTrainedTokenizerBase,
        framing: Framing,
    ) -> None:
        if any(limit < 1 for limit in limits):
            raise ValueError(f"limits={list(limits)} of commands must be at least 1 each")
        self._seats = [
            [_Seat(game, limit, tokenizer, framing) for _ in range(num_threads)]
            for game, limit in zip(games, limits, strict=True)
        ]

    def step(self, tokens: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        forced = [
            [seat.hear(token) if wrote else FREE for seat, token, wrote in zip(*row, strict=True)]
            for row in zip(self._seats, tokens.tolist(), written.tolist(), strict=True)
        ]
        return torch.tensor(forced, device=tokens.device)


class _Seat:
    """One thread at its copy of the game."""

    def __init__(self, game: Game, limit: int, tokenizer: PreTrainedTokenizerBase, framing: Framing) -> None:
        self._game, self._limit, self._tokenizer, self._framing = game, limit, tokenizer, framing
        self._commands: list[str] = []
        self._status = Status.RUNNING
        self._own: deque[int] = deque(maxlen=MAX_PENDING)
        self._answer: deque[int] = deque()
        self._speaks = False  # the token heard next is one of ours

    def hear(self, token: int) -> int:
        """Take a token that the thread got; returns the token to force next, or FREE."""
        if not self._speaks:
            self._listen(token)
        self._speaks = bool(self._answer)
        return self._answer.popleft() if self._answer else FREE

    def _listen(self, token: int) -> None:
        self._own.append(token)
        if self._status != Status.RUNNING or self._framing.end not in _piece(token, self._tokenizer):
            return
        command = self._framing.command(str(self._tokenizer.decode(list(self._own))))
        if command is not None:
            self._own.clear()
            self._answer.extend(self._tokenizer.encode(self._play(command), add_special_tokens=False))

    def _play(self, command: str) -> str:
        self._commands.append(command)
        turn = self._game.after(self._commands)
        is_last = len(self._commands) == self._limit
        self._status = Status.OVER if is_last and turn.status == Status.RUNNING else turn.status
        return spell(turn.text, turn.score, self._status)


@lru_cache(maxsize=65_536)
def _piece(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([token]))
