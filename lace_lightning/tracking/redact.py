"""Keeping secrets out of what is logged: passwords and tokens in configs, URIs and diffs."""

from __future__ import annotations

import re
from collections.abc import Mapping

HIDDEN = "<hidden>"

# `max_new_tokens`, `pad_token` and `tokenizer` are no secrets: a token is one only by its qualifier or all alone.
_SECRET_WORD = (
    r"(?:[\w-]*[_-])?(?:password|passwd|secret|credentials?|(?:api|secret|private|access)[_-]?key)"
    r"|(?:[\w-]*[_-])?(?:auth|access|api|hf|hub|bearer|refresh|session|secret|github|gitlab|wandb)[_-]token"
    r"|token"
)
_SECRET_KEY = re.compile(_SECRET_WORD, re.IGNORECASE)
_SECRET_LINE = re.compile(rf"(?P<key>\b(?:{_SECRET_WORD})[\"']?\s*[:=]\s*)(?P<value>\S.*)", re.IGNORECASE)
_URI_PASSWORD = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/\s@\"']+@", re.IGNORECASE)


def redact(value: object, key: str = "") -> object:
    """A copy of nested settings in which texts under secret-looking keys, and passwords inside URIs, are hidden."""
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if not isinstance(value, str):
        return value
    last_part = re.split(r"[./]", key)[-1]
    return HIDDEN if value and _SECRET_KEY.fullmatch(last_part) else redact_uri(value)


def redact_uri(text: str) -> str:
    """The text without the ``user:password@`` of any URI in it."""
    return _URI_PASSWORD.sub(r"\g<scheme>", text)


def redact_lines(text: str) -> str:
    """Free text (a diff) in which the values of ``secret_key: value`` or ``secret_key = value`` are hidden."""
    return _SECRET_LINE.sub(rf"\g<key>{HIDDEN}", redact_uri(text))
