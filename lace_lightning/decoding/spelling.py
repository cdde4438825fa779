"""What each token of a thread adds to its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT = 8
"""Tokens that are spelled before a token, for the spaces and characters that tokens share."""
_STRIDE = 24
"""Tokens after which the context starts anew."""
_PARTIAL = "\ufffd"
"""How tokenizers spell a character of which only some bytes have come."""


def pieces_of(ids: Sequence[int], spell: Callable[[list[int]], str]) -> tuple[str, ...]:
    """The text that each token adds to that of the tokens before it; together the text of all of them.

    A character whose bytes are spread over several tokens stands at the last of them.

    Args:
        ids: token ids of one thread.
        spell: token ids as text: the tokenizer's ``decode``.
    """
    ids, pieces = list(ids), []
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        if end - start > _STRIDE:
            # What is still to come of a character is no part of the text so far.
            start, pending = end - 1 - _CONTEXT, len(spell(ids[start : end - 1])) - len(before)
            before = spell(ids[start : end - 1])
            before = before[: len(before) - pending]
        text = spell(ids[start:end])
        whole = text if end == len(ids) else text.rstrip(_PARTIAL)
        pieces.append(whole[len(before) :])
        before = whole if len(whole) > len(before) else before
    return tuple(pieces)
