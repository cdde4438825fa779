"""What the threads of one group have written so far, as text, while they are still being decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from lace_lightning.decoding.spelling import Speller

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lace_lightning.decoding import Column

SHADES = 5
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
    speller: Speller
    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    shades: list[int] = field(default_factory=list)
    state: State = State.WRITING

    def add(self, token: int, is_forced: bool) -> None:
        self.ids.append(token)
        self.pieces.append(self.speller.add(token))
        self.forced.append(is_forced)
        self.shades.append(0)

    def end(self, state: State) -> None:
        self.state = state
        if self.pieces:
            self.pieces[-1] += self.speller.rest()


class Transcript:
    """Collects the columns of one group.

    Args:
        num_threads: N.
        tokenizer: spells the tokens, special ones left out as in :class:`~lace_lightning.decoding.Thread`.
        eos_ids: tokens that end a thread.

    ``gate_range`` is the least and the most gate that was noted, if any.
    """

    def __init__(self, num_threads: int, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> None:
        self._tokenizer, self._eos_ids = tokenizer, frozenset(eos_ids)
        self._threads = [_Thread(Speller(self._spell)) for _ in range(num_threads)]
        self.num_columns = 0
        self.gate_range: tuple[float, float] | None = None

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
                thread.add(token, forced)
                if token in self._eos_ids:
                    thread.end(State.ENDED)
                    ended.append(index)
        return ended

    def close(self, state: State) -> list[int]:
        """Note why threads that have not ended go no further; returns them."""
        stopped = [index for index, thread in enumerate(self._threads) if thread.state is not State.ENDED]
        for index in stopped:
            self._threads[index].end(state)
        return stopped

    def shade(self, gates: Sequence[Sequence[float]]) -> None:
        """Note the mean gate, 0 … 1, at the first tokens of every thread, as far as it is known.

        Shades run from the least to the most of these (``gate_range``): a model uses but a part of 0 … 1.
        """
        known = [value for values in gates for value in values]
        least, most = self.gate_range = (min(known), max(known))
        width = most - least
        for thread, values in zip(self._threads, gates, strict=True):
            steps = [(value - least) / width if width else value for value in values]
            thread.shades[: len(values)] = [min(SHADES - 1, int(step * SHADES)) for step in steps]

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
        """The thread's text so far, cut where thread and environment take turns or the shade changes.

        A space between two pieces counts to the second.
        """
        thread, spans = self._threads[index], list[Span]()
        for piece, is_forced, shade in zip(thread.pieces, thread.forced, thread.shades, strict=True):
            if spans and spans[-1][1:] == (is_forced, shade):
                spans[-1] = Span(spans[-1].text + piece, is_forced, shade)
            elif piece:
                spans.append(Span(piece, is_forced, shade))
        return spans

    def _spell(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
