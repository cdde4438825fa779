"""Who writes, who waits at the barrier, who has ended, and what is forced next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lace_lightning.decoding.environment import FREE


@dataclass(frozen=True)
class Rules:
    """What ends and what stops a thread.

    Args:
        eos_ids: tokens that end a thread.
        pad_id: stands where nothing was written.
        opening_ids: ids that open the closing assessment; a thread that has written them waits for its group
            (the barrier). Empty: no thread ever waits.
    """

    eos_ids: tuple[int, ...]
    pad_id: int
    opening_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Column:
    """What was decoded in one lattice column; handed to ``on_column`` while decoding goes on.

    Args:
        time: lattice time t.
        tokens, written, forced: (B, N): token ids, whether the thread wrote one, whether an environment chose it.
        logprobs: (B, N) float32, 0 where the thread did not choose.
    """

    time: int
    tokens: Tensor
    written: Tensor
    forced: Tensor
    logprobs: Tensor


class Threads:
    """The state of B groups of N threads between columns: all (B, N)."""

    def __init__(self, rules: Rules, shape: Sequence[int], device: torch.device) -> None:
        self._pad_id = rules.pad_id
        self._eos = torch.tensor(rules.eos_ids, device=device)
        self._opening = torch.tensor(rules.opening_ids, dtype=torch.long, device=device)
        self._recent = torch.full((*shape, len(rules.opening_ids)), FREE, device=device)
        self._due = torch.full(tuple(shape), FREE, device=device)
        self._opened = torch.zeros(tuple(shape), dtype=torch.bool, device=device)
        self._waiting = torch.zeros_like(self._opened)
        self.ended = torch.zeros_like(self._opened)
        self.tokens = torch.full(tuple(shape), rules.pad_id, device=device)
        self.written = ~self.ended

    def all_ended(self) -> bool:
        return bool(self.ended.all())

    def write(self, time: int, drawn: Tensor, logits: Tensor) -> Column:
        """Let every thread that neither waits nor has ended write its forced or drawn token."""
        self.written = ~(self.ended | self._waiting)
        forced = self.written & (self._due != FREE)
        tokens = torch.where(forced, self._due, drawn)
        self.tokens = torch.where(self.written, tokens, self._pad_id)
        self._due = self._due.masked_fill(self.written, FREE)
        chosen = self.written & ~forced
        logprobs = logits.log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
        self.ended = self.ended | (self.written & torch.isin(self.tokens, self._eos))
        self._meet_at_barrier()
        return Column(time, self.tokens, self.written, forced, torch.where(chosen, logprobs, 0.0))

    def force(self, tokens: Tensor) -> None:
        """Note what the environment wants written, until the thread next writes."""
        self._due = torch.where(tokens != FREE, tokens, self._due)

    def _meet_at_barrier(self) -> None:
        if not len(self._opening):
            return
        shifted = torch.cat([self._recent[..., 1:], self.tokens[..., None]], dim=-1)
        self._recent = torch.where(self.written[..., None], shifted, self._recent)
        self._opened = self._opened | (self._recent == self._opening).all(-1)
        everyone_arrived = (self._opened | self.ended).all(-1, keepdim=True)
        self._waiting = self._opened & ~self.ended & ~everyone_arrived
