"""How a problem and a thread are spelled as text and as token ids.

A thread reads ``prompt | thought … | assessment opening | answer | tag | end of sequence``. Each piece is tokenised on
its own and the ids are joined, so that a piece has the same ids whatever stands before it: the barrier recognises the
assessment opening by its ids, and an environment writes a verdict with the ids that training showed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from lace_lightning.traces.schema import TraceThread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Segment(IntEnum):
    """The part of a thread that a token belongs to; 0 is padding and waiting columns."""

    NONE = 0
    PROMPT = 1
    THOUGHT = 2
    ENVIRONMENT = 3
    ASSESSMENT = 4
    TAG = 5


class EncodedThread(NamedTuple):
    """Token ids of one thread after the prompt, the segment of each, and where its assessment opening starts."""

    ids: list[int]
    segments: list[Segment]
    assessment_start: int


@dataclass(frozen=True)
class Template:
    r"""Spelling of prompts, assessments and answers.

    Args:
        prompt: format string around the problem's ``{text}``.
        opening: what opens the closing assessment; the barrier aligns threads right after it.
        answer: format string around the thread's ``{answer}``.
        separator: stands between answer and tag.
    """

    prompt: str = "{text}\n\n"
    opening: str = "\n\n### Assessment\n"
    answer: str = "\\boxed{{{answer}}}"
    separator: str = " "

    def encode_prompt(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the prompt, with the tokenizer's own beginning-of-sequence token if it has one."""
        ids = _encode(self.prompt.format(text=text), tokenizer)
        return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]

    def encode_opening(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids that open the closing assessment.

        Raises:
            ValueError: the tokenizer has no tokens for it, or drops part of it.
        """
        ids = _encode(self.opening, tokenizer)
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(
                f"template.opening={self.opening!r} has no token ids in this tokenizer ({ids}): choose text that the "
                "tokenizer knows, or add it as a token"
            )
        return ids

    def encode_thread(self, thread: TraceThread, tokenizer: PreTrainedTokenizerBase) -> EncodedThread:
        """Token ids and segments of one trace thread, end-of-sequence included."""
        ids: list[int] = []
        segments: list[Segment] = []

        def add(piece: str | list[int], segment: Segment) -> None:
            piece_ids = _encode(piece, tokenizer) if isinstance(piece, str) else piece
            ids.extend(piece_ids)
            segments.extend([segment] * len(piece_ids))

        position = 0
        for start, end in thread.forced:
            add(thread.text[position:start], Segment.THOUGHT)
            add(thread.text[start:end], Segment.ENVIRONMENT)
            position = end
        add(thread.text[position:], Segment.THOUGHT)
        assessment_start = len(ids)
        add(self.encode_opening(tokenizer), Segment.ASSESSMENT)
        add(self.answer.format(answer=thread.answer) + self.separator, Segment.ASSESSMENT)
        add(str(thread.tag), Segment.TAG)
        add([tokenizer.eos_token_id], Segment.TAG)
        return EncodedThread(ids, segments, assessment_start)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if len(text) > _SHORT:
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(_encode_short(text, tokenizer, len(tokenizer)))


_SHORT = 64
"""Pieces up to so many characters (tags, openings, verdicts, puzzle moves) recur; a tokenizer call costs 15 us each."""


@lru_cache(maxsize=16_384)
def _encode_short(text: str, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> tuple[int, ...]:
    """Token ids of a short piece; the size is part of the key because tokens may be added to a tokenizer."""
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()
