"""Keeping secrets out of what is logged, saved and shown: the one place that decides what a secret is.

Three nets, from the surest to the widest: what the environment holds under a secret-looking name is hidden wherever it
turns up; so is what has the shape of a well-known token or stands as a password in a URI; and so are values under
secret-looking keys.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from urllib.parse import quote, unquote

HIDDEN = "<hidden>"
MIN_CHARACTERS = 8
"""What is shorter is no secret of the environment: hiding ``EMPTY`` or ``none`` everywhere would garble texts."""

# Texts may be long and hostile: patterns begin at the start of a word only, and every repetition has a bound, so that
# time grows with the length of the text and not with its square.
#
# `max_new_tokens`, `pad_token` and `tokenizer` are no secrets: a token is one only by its qualifier or all alone.
_SECRET_WORD = (
    r"[\w-]{0,100}?(?:password|passwd|passphrase)"
    r"|(?:[\w-]{0,100}?[_-])?(?:secret|credentials?|authorization|cookie|"
    r"(?:api|secret|private|access|auth|account|encryption|openai|anthropic|wandb|hf|license)[_-]?key)"
    r"|(?:[\w-]{0,100}?[_-])?(?:auth|access|api|hf|hub|bearer|refresh|session|secret|security|github|gitlab|wandb|tracking|"
    r"slack|pypi|private|deploy|personal)[_-]token"
    r"|(?:--?)?token"
)
_SECRET_KEY = re.compile(_SECRET_WORD, re.IGNORECASE)
_SECRET_LINE = re.compile(rf"(?P<key>(?<![\w-])(?:{_SECRET_WORD})[\"']?\s*[:=]\s*)(?P<value>\S.*)", re.IGNORECASE)
_SECRET_OPTION = re.compile(
    rf"(?P<key>(?<![\w.-])--(?:[\w-]{{1,100}}\.){{0,9}}(?:{_SECRET_WORD})\s+)(?P<value>[^\s-]\S*)", re.IGNORECASE
)
_ENVIRONMENT_NAME = re.compile(
    r"(?:.*_)?(?:TOKEN|KEY|SECRET|CREDENTIAL)S?|.*(?:PASSWORD|PASSWD|PASSPHRASE|APIKEY)S?", re.IGNORECASE
)

# A password may hold "@" and, where people do not encode it, "/"; "host:5000/a@b" has a port and no password.
_URI_PASSWORD = re.compile(r"(?<=://)(?:[^/\s\"'<>@:]{0,100}:(?!\d{0,5}/)[^\s\"'<>]{1,1000}@|[^/\s\"'<>]{1,1000}@)")
_URI_QUERY = re.compile(
    rf"(?P<key>[?&;](?:{_SECRET_WORD}|sig|[\w-]{{0,100}}signature|[\w-]{{0,100}}credential)=)[^&\s\"'<>]+",
    re.IGNORECASE,
)
_TOKEN_SHAPE = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|AKIA)[A-Za-z0-9_-]{16,}"
    r"|\beyJ[\w-]{10,2000}\.eyJ[\w-]{10,2000}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)


def redact(value: object, key: str = "") -> object:
    """A copy of nested settings without secrets: those under secret-looking keys, and those inside any text."""
    if isinstance(value, Mapping):
        return {name: redact(item, key if _is_secret(key) else str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if _is_secret(key) and _can_be_secret(value, key):
        return HIDDEN
    return redact_text(value) if isinstance(value, str) else value


def redact_uri(text: str) -> str:
    """The text without the ``user:password@`` of any URI in it, and without secrets among the URI's options."""
    return _URI_QUERY.sub(rf"\g<key>{HIDDEN}", _URI_PASSWORD.sub("", text))


def redact_text(text: str) -> str:
    """The text without what is a secret wherever it stands: see :func:`hide_known`, URIs, and shapes of tokens."""
    return redact_uri(_TOKEN_SHAPE.sub(HIDDEN, hide_known(text)))


def redact_lines(text: str) -> str:
    """:func:`redact_text`, and the values of ``secret_key: value``, ``secret_key = value``, ``--secret-key value``."""
    text = _SECRET_OPTION.sub(rf"\g<key>{HIDDEN}", redact_text(text))
    return _SECRET_LINE.sub(rf"\g<key>{HIDDEN}", text)


def hide_known(text: str) -> str:
    """The text without any value that a variable of the environment holds under a secret-looking name.

    Also as JSON, URLs and HTML spell it. Passwords in URIs that variables hold are such values too.
    """
    pattern = _any_of(frozenset(_secrets(os.environ)))
    return text if pattern is None else pattern.sub(HIDDEN, text)


def _is_secret(key: str) -> bool:
    return bool(key) and _SECRET_KEY.fullmatch(re.split(r"[./]", key)[-1]) is not None


def _can_be_secret(value: object, key: str) -> bool:
    """Numbers are passwords too; the number of a ``token`` is its id."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not key.lower().endswith("token")
    return is_number or (isinstance(value, str) and value != "")


def _secrets(environment: Mapping[str, str]) -> Iterable[str]:
    for name, value in environment.items():
        if _ENVIRONMENT_NAME.fullmatch(name):
            yield value.strip()
        elif "://" in value and (found := _URI_PASSWORD.search(value)):
            password = found[0].removesuffix("@").partition(":")[2]
            yield from (password, unquote(password))


@lru_cache(maxsize=4)
def _any_of(secrets: frozenset[str]) -> re.Pattern[str] | None:
    """Matches a secret in any of its spellings, the longest first; None if there are none."""
    spellings = {
        spelled
        for secret in secrets
        if len(secret) >= MIN_CHARACTERS
        for spelled in (secret, json.dumps(secret)[1:-1], quote(secret, safe=""), html.escape(secret))
    }
    if not spellings:
        return None
    alternatives = "|".join(re.escape(spelled) for spelled in sorted(spellings, key=len, reverse=True))
    return re.compile(rf"(?<![A-Za-z0-9])(?:{alternatives})(?![A-Za-z0-9])")
