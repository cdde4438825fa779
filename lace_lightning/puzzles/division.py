"""How the oracle's threads divide a search among themselves while they read each other (LACE.md §8)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import Generic, NamedTuple, TypeVar

from lace_lightning.traces.schema import Tag

C = TypeVar("C")


class Attempt(NamedTuple, Generic[C]):
    """One try of one thread: what it proposed, what it committed to, and whether that was a winner."""

    proposed: C
    committed: C
    is_hit: bool


def divide_search(
    candidates: Sequence[C], winners: Collection[C], num_threads: int, tries: int, rng: Random
) -> list[list[Attempt[C]]]:
    """Let threads search ``candidates`` for one of ``winners`` in ``tries`` simultaneous rounds.

    A round has two columns, because a thread can react only to what stands in an earlier one:

    - *propose*: any candidate that no thread has committed to so far, uniformly. If none is left: one that somebody
      found to be a winner; if there is no such either: any.
    - *commit*: the proposal; but if a lower thread has just proposed the same one, any untried candidate that nobody
      proposed, uniformly. If there is none, the proposal after all.

    A thread that has found a winner proposes and commits it again in every later round, so threads keep equal lengths.

    Returns:
        The attempts of each thread, ``num_threads`` lists of ``tries``.
    """
    attempts: list[list[Attempt[C]]] = [[] for _ in range(num_threads)]
    tried: set[C] = set()
    for _ in range(tries):
        untried = [candidate for candidate in candidates if candidate not in tried]
        fallback = untried or [candidate for candidate in candidates if candidate in winners] or candidates
        found = [bool(own) and own[-1].is_hit for own in attempts]
        proposals = [
            own[-1].committed if is_found else rng.choice(fallback)
            for own, is_found in zip(attempts, found, strict=True)
        ]
        unproposed = [candidate for candidate in untried if candidate not in proposals]
        for n, proposal in enumerate(proposals):
            gives_way = unproposed and not found[n] and proposal in proposals[:n]
            committed = rng.choice(unproposed) if gives_way else proposal
            attempts[n].append(Attempt(proposal, committed, committed in winners))
            tried.add(committed)
    return attempts


def assess(attempts: Sequence[Sequence[Attempt[C]]]) -> list[Tag]:
    """Tags that are always valid: the lowest finder is best, other finders success, the rest fail.

    If nobody found a winner, thread 0 says best.
    """
    found = [own[-1].is_hit for own in attempts]
    best = found.index(True) if True in found else 0
    tags = [Tag.SUCCESS if is_found else Tag.FAIL for is_found in found]
    tags[best] = Tag.BEST
    return tags
