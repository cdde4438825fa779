"""What each token of a thread adds to its text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

_CONTEXT = 8
"""Tokens that are spelled before a token, for the spaces and characters that tokens share."""
_STRIDE = 24
"""Tokens after which the context starts anew, once nothing is held back."""
_PARTIAL = "\ufffd"
"""How tokenizers spell a character of which only some bytes have come."""


class Speller:
    """Spells one thread token by token, in time that grows only with runs of bytes that are no text.

    A character whose bytes are spread over several tokens stands at the last of them.

    Args:
        spell: token ids as text: the tokenizer's ``decode``.
    """

    def __init__(self, spell: Callable[[list[int]], str]) -> None:
        self._spell = spell
        self._ids: list[int] = []
        self._text = ""  # of these ids
        self._told = ""  # so much of it has been returned

    def add(self, token: int) -> str:
        """The text that one more token adds to that of the tokens before it."""
        # Not in the midst of a character: its bytes would be torn apart.
        if len(self._ids) >= _STRIDE and self._told == self._text:
            self._ids = self._ids[-_CONTEXT:]
            self._told = self._spell(self._ids)
        self._ids.append(token)
        self._text = self._spell(self._ids)
        return self._tell(self._text.rstrip(_PARTIAL))

    def rest(self) -> str:
        """What was held back of a character that never came whole; for the end of the thread."""
        return self._tell(self._text)

    def _tell(self, text: str) -> str:
        piece = text[len(self._told) :]
        if piece:
            self._told = text
        return piece


def pieces_of(ids: Iterable[int], spell: Callable[[list[int]], str]) -> tuple[str, ...]:
    """The text that each token adds to that of the tokens before it; together the text of all of them.

    Args:
        ids: token ids of one thread.
        spell: token ids as text: the tokenizer's ``decode``.
    """
    speller = Speller(spell)
    pieces = [speller.add(token) for token in ids]
    if pieces:
        pieces[-1] += speller.rest()
    return tuple(pieces)
