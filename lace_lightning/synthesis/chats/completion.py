"""From the JSON of a chat completion to a reply."""

from __future__ import annotations

import json
from typing import Any, Literal

from lace_lightning.synthesis.chat import ChatReply

_FINISHES: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


class BadAnswer(ValueError):
    """What came back is no chat completion."""


def read_completion(body: str) -> ChatReply:
    """The first choice of a completion; only what a reply needs is looked at.

    An empty text is a reply. A ``finish_reason`` other than ``stop`` and ``length`` (``content_filter``, say) makes an
    error that counts its tokens.

    Raises:
        BadAnswer: the body is no JSON, or has no such choice.
    """
    try:
        completion = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"{len(body)} characters that are no JSON") from error
    choice = _first(_field(completion, "choices", list))
    text = _field(choice, "message", dict).get("content") or ""
    if not isinstance(text, str):
        raise BadAnswer(f"message.content is of type {type(text).__name__}")
    reason = _field(choice, "finish_reason", str)
    usage = completion.get("usage")
    read, written = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    if reason not in _FINISHES:
        return ChatReply("", "error", read, written, f"the server ended the reply with finish_reason={reason[:40]!r}")
    return ChatReply(without_surrogates(text), _FINISHES[reason], read, written)


def without_surrogates(text: str) -> str:
    """The text with lone surrogates, which no file in UTF-8 can hold, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _field(value: Any, name: str, kind: type) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise BadAnswer(f"JSON without {name} of type {kind.__name__}")
    return found


def _first(choices: list[Any]) -> Any:
    if not choices:
        raise BadAnswer("a completion without choices")
    return choices[0]


def _count(usage: Any, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 <= count < 2**31 else 0
