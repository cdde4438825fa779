"""What a failed attempt means: try again, give up this request, or end the run."""

from __future__ import annotations

import email.utils
import math
import time
from dataclasses import dataclass
from typing import Literal

from openai import APIConnectionError, APIStatusError

from lace_lightning.printable import one_line

Outlook = Literal["retry", "unreachable", "request", "key", "model", "credit"]
"""``retry``: may pass. ``unreachable``: nobody listens there (yet), or a gateway says so. ``request``: the server will
not have this request. The rest is the same for all requests: the key is refused, the model is unknown, nobody pays."""

_MAY_PASS = {408, 409, 425, 429}
_AWAY = {502, 503, 504}
"""What a gateway says while the server behind it is away, and a server while it loads its model."""
_OUTLOOKS: dict[int, Outlook] = {401: "key", 402: "credit", 403: "key", 404: "model", 405: "model"}
_NEVER_CONNECTED = {"ConnectError", "ConnectTimeout"}
_HIDDEN = "<hidden>"
_SHORTEST_KEY = 8
_EXCERPT = 300
"""Characters of the server's own words in a message."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt.

    Args:
        outlook: what it means for the next one.
        reason: in words, on one line.
        wait: seconds that the server asked for (Retry-After).
    """

    outlook: Outlook
    reason: str
    wait: float = 0.0


def failure_of(error: Exception, key: str = "") -> Failure:
    """Judge what an attempt raised: an error of the OpenAI client, a time-out, or an answer that is no completion.

    The reason never holds ``key``, even where the server sent it back.
    """
    if isinstance(error, APIStatusError):
        return _refusal(error, key)
    if isinstance(error, APIConnectionError):
        cause = type(error.__cause__).__name__
        if cause in _NEVER_CONNECTED:
            return Failure("unreachable", f"no connection: {_excerpt(str(error.__cause__), key)}")
        return Failure("retry", f"the connection broke ({cause})")
    if isinstance(error, TimeoutError):
        return Failure("retry", "no whole answer in time")
    return Failure("retry", f"bad answer: {_excerpt(str(error), key)}")


def _excerpt(text: str, key: str) -> str:
    """The beginning; the key goes first, or a cut through it would leave a part."""
    hidden = without_key(text, key)
    return one_line(hidden[: 4 * _EXCERPT])[:_EXCERPT]


def without_key(text: str, key: str) -> str:
    """A server's words without the key, should it send it back; a short one (``EMPTY``) is no secret."""
    return text.replace(key, _HIDDEN) if len(key) >= _SHORTEST_KEY else text


def _refusal(error: APIStatusError, key: str) -> Failure:
    status = error.status_code
    reason = f"{status} {_excerpt(error.response.text, key)}".strip()
    if error.code == "insufficient_quota":  # comes as 429, and no waiting helps
        return Failure("credit", reason)
    if status in _MAY_PASS or status >= 500:
        outlook: Outlook = "unreachable" if status in _AWAY else "retry"
        return Failure(outlook, reason, _retry_after(error.response.headers.get("retry-after", "")))
    return Failure(_OUTLOOKS.get(status, "request"), reason)


def _retry_after(value: str) -> float:
    """Seconds, of a number of them or a date; 0 for anything else."""
    try:
        seconds = float(value)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        seconds = 0.0 if date is None else email.utils.mktime_tz(date) - time.time()
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
