"""What the threads of one group have written so far, as text, while they are still being decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from os.path import commonprefix
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lace_lightning.decoding import Column

SHADES = 5
MAX_SHADED_TOKENS = 1024
"""Longer threads are not shaded: each change of shade spells the thread anew."""
REPLACEMENT = "\ufffd"


class State(StrEnum):
    """What a thread is doing: it waits at the barrier, has ended itself, or was stopped at the limit or by Ctrl-C."""

    WRITING = "writing"
    WAITING = "waiting"
    ENDED = "ended"
    LIMIT = "stopped at the token limit"
    INTERRUPTED = "interrupted"


class Span(NamedTuple):
    """A piece of a thread's text, written by the thread itself or by the environment, and how far its gates stood open.

    ``shade`` runs from 0 to ``SHADES`` - 1; it is 0 where gates are not known.
    """

    text: str
    is_forced: bool
    shade: int = 0


@dataclass
class _Thread:
    ids: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    shades: list[int] = field(default_factory=list)
    state: State = State.WRITING

    def kind(self, turn: int) -> tuple[bool, int]:
        """Who wrote a token, and its shade."""
        return self.forced[turn], self.shades[turn]


class Transcript:
    """Collects the columns of one group.

    Args:
        num_threads: N.
        tokenizer: spells the tokens, special ones left out as in :class:`~lace_lightning.decoding.Thread`.
        eos_ids: tokens that end a thread.
    """

    def __init__(self, num_threads: int, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> None:
        self._tokenizer, self._eos_ids = tokenizer, frozenset(eos_ids)
        self._threads = [_Thread() for _ in range(num_threads)]
        self.num_columns = 0

    @property
    def num_threads(self) -> int:
        return len(self._threads)

    def add(self, column: Column) -> list[int]:
        """Take one column of a batch of one group; returns the threads that ended in it."""
        self.num_columns += 1
        ended = []
        rows = (tensor[0].tolist() for tensor in (column.tokens, column.written, column.forced))
        for index, (thread, token, written, forced) in enumerate(zip(self._threads, *rows, strict=True)):
            if thread.state is State.ENDED:
                continue
            thread.state = State.WRITING if written else State.WAITING
            if written:
                thread.ids.append(token)
                thread.forced.append(forced)
                thread.shades.append(0)
                if token in self._eos_ids:
                    thread.state = State.ENDED
                    ended.append(index)
        return ended

    def close(self, state: State) -> list[int]:
        """Note why threads that have not ended go no further; returns them."""
        stopped = [index for index, thread in enumerate(self._threads) if thread.state is not State.ENDED]
        for index in stopped:
            self._threads[index].state = state
        return stopped

    def shade(self, gates: Sequence[Sequence[float]]) -> None:
        """Note the mean gate, 0 … 1, at every token of every thread."""
        for thread, values in zip(self._threads, gates, strict=True):
            if len(values) == len(thread.ids) <= MAX_SHADED_TOKENS:
                thread.shades = [min(SHADES - 1, int(value * SHADES)) for value in values]

    def state(self, index: int) -> State:
        return self._threads[index].state

    def status(self, index: int) -> str:
        """State and length of a thread, forced tokens included."""
        count = len(self._threads[index].ids)
        return f"{self.state(index)}, {count} token{'' if count == 1 else 's'}"

    def text(self, index: int) -> str:
        """The thread's text so far; while it goes on, a last character of which only some bytes came is held back.

        The whole thread is spelled each time: no tokenizer promises that the texts of two halves join to the whole's.
        """
        thread = self._threads[index]
        text = self._spell(thread.ids)
        return text.rstrip(REPLACEMENT) if thread.state in (State.WRITING, State.WAITING) else text

    def spans(self, index: int) -> list[Span]:
        """:meth:`text`, cut where thread and environment take turns or the shade changes.

        A space between two pieces counts to the second.
        """
        thread, text = self._threads[index], self.text(index)
        spans, start = [], 0
        for turn in range(1, len(thread.ids) + 1):
            is_last = turn == len(thread.ids)
            if is_last or thread.kind(turn) != thread.kind(turn - 1):
                before = text if is_last else commonprefix([text, self._spell(thread.ids[:turn])])
                end = max(start, len(before))
                spans.append(Span(text[start:end], *thread.kind(turn - 1)))
                start = end
        return spans

    def _spell(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
