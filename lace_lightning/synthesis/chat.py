"""The interface of language models as teachers: chat requests in, replies with their token counts out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ChatRequest:
    """One question to a chat model.

    Args:
        messages: ``(role, content)`` pairs; roles are ``system``, ``user`` and ``assistant``.
        seed: of the sampling; requests with the same content and seed are the same request.
        max_tokens: most tokens of the reply.
        temperature: 0 takes the most probable token.
        top_p: nucleus.
    """

    messages: tuple[tuple[str, str], ...]
    seed: int = 0
    max_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class ChatReply:
    """What came back.

    Args:
        text: the reply; empty where there is none.
        finish: ``stop``, ``length``, or ``error`` if every attempt failed.
        prompt_tokens, completion_tokens: as counted by the model's server, or by its tokenizer.
        error: why there is no reply.
        is_cached: it was paid for before: in an earlier run, or for an equal request of this one.
    """

    text: str
    finish: Literal["stop", "length", "error"]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    is_cached: bool = False


class ChatError(RuntimeError):
    """What no retry mends, whatever the request: a refused key, an unknown model, a damaged cache. It ends a run."""


OnReply = Callable[[int, ChatReply], None]
"""Is told the index of a request and its reply."""


class ChatModel(ABC):
    """Answers chat requests. YAML chooses it by class path.

    Attributes:
        identity: what the replies depend on besides the request (model name, revision); part of every cache key.
    """

    identity: str

    @abstractmethod
    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """Replies in order; a request that fails for good has ``finish="error"``, it never raises for one.

        Raises:
            ChatError: no request can succeed.
        """

    def ask_each(self, requests: Sequence[ChatRequest], on_reply: OnReply) -> None:
        """Like :meth:`ask`, but hands over each reply as soon as it is there, in any order.

        ``on_reply`` is called once per request, one call at a time, maybe in another thread than the caller's.
        What ``on_reply`` raises ends the asking and comes out here.
        """
        for index, reply in enumerate(self.ask(requests)):
            on_reply(index, reply)


class EagerChatModel(ChatModel):
    """A chat model that is written as :meth:`~ChatModel.ask_each`."""

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        replies: dict[int, ChatReply] = {}
        self.ask_each(requests, replies.__setitem__)
        return [replies[index] for index in range(len(requests))]

    @abstractmethod
    def ask_each(self, requests: Sequence[ChatRequest], on_reply: OnReply) -> None: ...
