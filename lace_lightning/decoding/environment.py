"""Environments: what answers a thread's actions while its group is decoded (LACE.md §8)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

FREE = -1
"""In a forced-token tensor: this thread samples its own next token."""


class Environment(ABC):
    """Observes every thread of a batch of groups after each step and writes tokens into chosen threads.

    One instance serves one batch of B groups of N threads, from its first step to its last. Forced tokens enter the
    threads like sampled ones (others read them, the backbone sees them) but are no decision of the model: they carry
    no log-probability and are masked in every loss and in diversity. A thread that waits at the barrier or has ended
    is not forced.
    """

    @abstractmethod
    def step(self, tokens: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Take the tokens of one column and say what must stand in the next one.

        Args:
            tokens: (B, N) long, the token ids the threads just got, sampled or forced; undefined where not written.
            written: (B, N) bool, whether thread n really got a token in this column (not waiting, not ended).

        Returns:
            (B, N) long on the device of ``tokens``: a token id to force, or :data:`FREE`. What is forced into a
            thread that does not write in the next column stays due until it does: return it once.
        """
