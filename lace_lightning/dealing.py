"""Which process samples which groups."""

from __future__ import annotations

from collections.abc import Sequence


def deal(lengths: Sequence[int], num_processes: int) -> list[list[int]]:
    """Share groups out so that every process gets as many as any other, and as many of every length.

    They are dealt like cards, the longest first. Groups of one problem, which are as long as each other and often end
    alike, so go to different processes.

    Args:
        lengths: of each group: its prompt's tokens, or what else is known before it is sampled.
        num_processes: hands to deal to.

    Returns:
        Indices into ``lengths`` for each process, in ascending order; with few groups, none for some.

    >>> deal([5, 5, 9, 9, 9, 5], 2)
    [[1, 2, 4], [0, 3, 5]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [sorted(longest_first[process::num_processes]) for process in range(num_processes)]
