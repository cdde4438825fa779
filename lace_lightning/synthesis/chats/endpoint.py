"""A chat model behind any OpenAI-compatible endpoint: vLLM, SGLang, ``transformers serve``, OpenAI."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from urllib.parse import urlsplit

from lace_lightning.synthesis.chat import ChatError, ChatReply, ChatRequest, EagerChatModel, OnReply
from lace_lightning.synthesis.chats.completion import BadAnswer, read_completion, without_surrogates
from lace_lightning.synthesis.chats.event_loop import run_all, run_apart

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from lace_lightning.synthesis.chats.failure import Failure

_log = logging.getLogger(__name__)
_jitter = random.Random()

_LONGEST_WAIT = 60.0
"""Seconds: the back-off doubles up to here."""

_CONNECT_LIMIT = 10.0
"""Seconds for making a connection; an answer may take longer."""

_MAX_CONCURRENCY = 1000
"""Connections that the client keeps at most."""

_OURS = {"model", "messages", "seed", "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "stream"}


class OpenAIChat(EagerChatModel):
    """Asks a server through the official client, ``concurrency`` requests at a time.

    An attempt that may pass next time (429, 5xx, time-out, broken connection, an answer that is no completion) is
    repeated with growing waits, Retry-After respected, until ``max_attempts`` or ``patience`` is used up; the request
    then has an error as its reply. While nobody listens at ``base_url`` it is tried until ``patience`` is used up.

    Args:
        model: the name that the server knows it by.
        base_url: of the server, with its ``/v1``: ``http://127.0.0.1:8000/v1``. No key belongs into it.
        api_key_env: NAME of the environment variable that holds the key; null sends none.
        concurrency: most requests in flight.
        timeout: seconds for one attempt, to the last byte.
        patience: seconds for one request, all attempts and waits together.
        max_attempts: of one request.
        backoff: seconds before the second attempt; doubled each time, up to a minute, and shortened at random by up to
            a half.
        extra: further fields of every request, such as ``chat_template_kwargs``; part of the identity, and so of the
            data: no key belongs into it.
        revision: whatever tells apart models that were served under one name; part of the identity.
        limit_field: how the server calls the limit on the reply's tokens; old servers know only ``max_tokens``.

    Raises:
        ValueError: an option is out of range, or the environment has no such variable.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key_env: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        patience: float = 1800.0,
        max_attempts: int = 8,
        backoff: float = 1.0,
        extra: dict[str, Any] | None = None,
        revision: str = "",
        limit_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens",
    ) -> None:
        _check_url(base_url)
        for name, value in {"timeout": timeout, "patience": patience, "backoff": backoff}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be a positive number of seconds")
        if not 1 <= concurrency <= _MAX_CONCURRENCY:
            raise ValueError(f"concurrency={concurrency} must be between 1 and {_MAX_CONCURRENCY}")
        if max_attempts < 1:
            raise ValueError(f"max_attempts={max_attempts} must be at least 1")
        if clash := _OURS & set(extra or {}):
            raise ValueError(f"extra sets {', '.join(sorted(clash))}, which each request sets itself: leave it out")
        _check_no_secret(extra or {})
        self.model, self.base_url, self.api_key_env = model, base_url, api_key_env
        self.concurrency, self.timeout, self.patience = concurrency, timeout, patience
        self.max_attempts, self.backoff = max_attempts, backoff
        self.extra, self.limit_field = dict(extra or {}), limit_field
        self.identity = json.dumps({"model": model, "revision": revision, "extra": self.extra}, sort_keys=True)
        _read_key(api_key_env)

    def ask_each(self, requests: Sequence[ChatRequest], on_reply: OnReply) -> None:
        run_apart(self._ask_all(requests, on_reply))

    async def _ask_all(self, requests: Sequence[ChatRequest], on_reply: OnReply) -> None:
        from openai import AsyncOpenAI, Timeout

        key = _read_key(self.api_key_env)
        waiting = iter(list(enumerate(requests)))

        async def work(client: AsyncOpenAI) -> None:
            for index, request in waiting:  # one iterator for all workers
                on_reply(index, await self._reply(client, request, key))

        # Attempts are timed and repeated here: the client's own time-outs restart with every byte, and it neither
        # repeats garbled answers nor knows of a patience. "none" keeps it from taking a key from the environment.
        limits = Timeout(None, connect=_CONNECT_LIMIT)
        async with AsyncOpenAI(base_url=self.base_url, api_key=key or "none", max_retries=0, timeout=limits) as client:
            await run_all(work(client) for _ in range(min(self.concurrency, len(requests))))

    async def _reply(self, client: AsyncOpenAI, request: ChatRequest, key: str) -> ChatReply:
        clock = asyncio.get_running_loop().time
        deadline, attempt = clock() + self.patience, 0
        while True:
            attempt += 1
            result = await self._attempt(client, request, key, deadline)
            if isinstance(result, ChatReply):
                return result
            wait = max(result.wait, _backoff(self.backoff, attempt))
            is_last = attempt >= self.max_attempts and result.outlook != "unreachable"
            if result.outlook not in ("retry", "unreachable") or is_last or clock() + wait >= deadline:
                break
            _log.warning("attempt %d at %s failed, next in %.1f s: %s", attempt, self.base_url, wait, result.reason)
            await asyncio.sleep(wait)
        if result.outlook not in ("retry", "request"):
            self._end_run(result)
        return ChatReply("", "error", error=f"{result.reason} (attempt {attempt} was the last)")

    async def _attempt(
        self, client: AsyncOpenAI, request: ChatRequest, key: str, deadline: float
    ) -> ChatReply | Failure:
        from openai import OpenAIError

        from lace_lightning.synthesis.chats.failure import failure_of, without_key

        try:
            async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + self.timeout)):
                answer = await client.chat.completions.with_raw_response.create(**self._fields(request))
            return read_completion(without_key(answer.text, key))
        except (OpenAIError, TimeoutError, BadAnswer) as error:
            return failure_of(error, key)

    def _fields(self, request: ChatRequest) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": role, "content": without_surrogates(text)} for role, text in request.messages],
            "seed": request.seed % 2**31,  # what every server takes
            "temperature": request.temperature,
            "top_p": request.top_p,
            self.limit_field: request.max_tokens,
            "extra_body": self.extra,
        }

    def _end_run(self, failure: Failure) -> NoReturn:
        reason = failure.reason
        model, url, env = (f"{name}={getattr(self, name)!r}" for name in ("model", "base_url", "api_key_env"))
        raise ChatError(
            {
                "key": f"{url} refuses the key of {env} ({reason}): put a valid key into the environment variable that "
                "api_key_env names",
                "model": f"{model} or {url} is unknown to the server ({reason}): ask its /v1/models for the names that "
                "it serves, and see that base_url ends as its manual says, mostly in /v1",
                "credit": f"{url} wants to be paid first ({reason}): top up the account of {env}, then run again",
                "unreachable": f"nobody listens at {url} ({reason}; tried for patience={self.patience:g} s): start the "
                "server, or correct base_url, then run again",
            }[failure.outlook]
        )


def _backoff(first: float, attempt: int) -> float:
    longest = min(_LONGEST_WAIT, first * 2 ** min(attempt - 1, 30))
    return longest * _jitter.uniform(0.5, 1.0)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            "base_url has a user, password or query in it: give scheme://host:port/path, keys by api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"base_url={url!r} is no address: give one like http://127.0.0.1:8000/v1")


def _check_no_secret(extra: dict[str, Any]) -> None:
    """Raise ValueError if a field looks like a secret: ``extra`` is stored with the replies and the data."""
    from lace_lightning.tracking.redact import redact

    stored = json.loads(json.dumps(extra))  # numbers that are keys become texts, tuples lists, as `redact` has them
    if redact(stored) != stored:
        raise ValueError(
            "extra holds what looks like a secret, and is stored with the data; it is not repeated here: put the key "
            "into an environment variable, and that one's name into api_key_env"
        )


def _read_key(env: str | None) -> str:
    """The key; empty if none is wanted. No message holds the key, nor a name that may be one."""
    if env is None:
        return ""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", env):
        raise ValueError(
            "api_key_env must be the NAME of an environment variable, in capitals, such as OPENAI_API_KEY; what was "
            "given is no such name and is not repeated here, since it may be the key itself"
        )
    key = os.environ.get(env, "").strip()
    if not key:
        raise ValueError(f"api_key_env={env!r}: this environment variable is empty or not set: export {env}=…")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"api_key_env={env!r}: the key in it has characters that no HTTP header can carry")
    return key
