"""A chat model that never asks twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from lace_lightning.synthesis.chat import ChatModel, ChatReply, ChatRequest, EagerChatModel, OnReply
from lace_lightning.synthesis.chats.store import ReplyStore, request_key


class CachedChat(EagerChatModel):
    """Stores every reply of another chat model the moment it arrives, and asks only for what is not stored.

    Replies are found again by the model's identity and the request, so requests that differ in anything (a character,
    the seed) are different ones. Replies with ``finish="error"`` are not stored.

    Args:
        chat: the model that is asked.
        path: of the sqlite file that holds the replies; made if there is none. It belongs on a local disk.

    Raises:
        ChatError: the file is damaged, of another program, or cannot be written.
    """

    def __init__(self, chat: ChatModel, path: str) -> None:
        self.chat, self.path = chat, path
        with ReplyStore(path) as store:
            store.check()

    @property
    def identity(self) -> str:  # type: ignore[override]
        return self.chat.identity

    def ask_each(self, requests: Sequence[ChatRequest], on_reply: OnReply) -> None:
        keys = [request_key(self.identity, request) for request in requests]
        with ReplyStore(self.path) as store:
            stored = store.load(dict.fromkeys(keys))
            places: dict[str, list[int]] = defaultdict(list)
            for index, key in enumerate(keys):
                if key in stored:
                    on_reply(index, stored[key])
                else:
                    places[key].append(index)
            if places:
                self._ask_new(requests, list(places.values()), store, on_reply)

    def _ask_new(
        self, requests: Sequence[ChatRequest], places: Sequence[Sequence[int]], store: ReplyStore, on_reply: OnReply
    ) -> None:
        """Ask once for each of the different requests; ``places`` lists where in ``requests`` each one stands."""

        def keep(number: int, reply: ChatReply) -> None:
            first, *others = places[number]
            if reply.finish != "error":
                reply = store.save(self.identity, requests[first], reply)
            on_reply(first, reply)
            for index in others:
                on_reply(index, replace(reply, is_cached=True))

        self.chat.ask_each([requests[first] for first, *_ in places], keep)
