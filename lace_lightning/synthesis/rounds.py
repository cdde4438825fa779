"""Many conversations at once: each goes on with its own replies, and the questions of one round are asked together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

Question = TypeVar("Question")
Reply = TypeVar("Reply")
Result = TypeVar("Result")


def converse(
    talks: Iterable[Generator[Question, Reply, Result]],
    ask: Callable[[Sequence[Question]], Sequence[Reply]],
    width: int,
) -> Iterator[Result]:
    """Run generators that yield questions and are sent the replies.

    Args:
        talks: started only when there is room for them.
        ask: replies to a list of questions, in order.
        width: how many talks are held at once; a finished one makes room for the next.

    Yields:
        What each generator returns, as soon as it does; not in the order of ``talks``.
    """
    waiting = iter(talks)
    active: list[tuple[Generator[Question, Reply, Result], Question]] = []
    while True:
        while len(active) < width and (talk := next(waiting, None)) is not None:
            try:
                active.append((talk, next(talk)))
            except StopIteration as end:  # it had nothing to ask
                yield end.value
        if not active:
            return
        replies = ask([question for _, question in active])
        going, active = active, []
        for (talk, _), reply in zip(going, replies, strict=True):
            try:
                active.append((talk, talk.send(reply)))
            except StopIteration as end:
                yield end.value
