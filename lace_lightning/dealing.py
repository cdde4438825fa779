"""Which process samples which groups."""

from __future__ import annotations

from collections.abc import Sequence


def deal(lengths: Sequence[int], num_processes: int) -> list[list[int]]:
    """Share groups out so that every process gets as many, and of every length as many, as any other.

    They are dealt like cards, the longest first, back and forth (0, 1, 2, 2, 1, 0, …): groups of one problem, which
    are as long as each other and often end alike, go to different processes.

    Args:
        lengths: of each group: its prompt's tokens, or what else is known before it is sampled.
        num_processes: hands to deal to.

    Returns:
        Indices into ``lengths`` for each process, in ascending order; a process may get none.

    >>> deal([9, 9, 9, 5, 5, 5], 2)
    [[0, 3, 4], [1, 2, 5]]
    """
    hands: list[list[int]] = [[] for _ in range(num_processes)]
    there_and_back = [*range(num_processes), *reversed(range(num_processes))]
    for place, index in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        hands[there_and_back[place % len(there_and_back)]].append(index)
    return [sorted(hand) for hand in hands]
