"""Groups that are decoded a few columns at a time: the one place where the benchmark meets the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lace_lightning.decoding import GroupDecoder, Rollout, Sampling
from lace_lightning.decoding.decoder import _Threads, left_pad
from lace_lightning.decoding.random import uniform
from lace_lightning.threaded_lm import ThreadedLM

NEVER = -1
"""An end-of-sequence id that no sampler can draw: every thread writes until the last column."""


LEAD_IN = 8
"""Fewest columns decoded before the clock starts: an engine may get ready in its first ones."""


@dataclass(frozen=True)
class Point:
    """What is decoded.

    Args:
        threads: N.
        groups: B.
        prompt: prompt tokens of a group.
        lattice_time: columns that every thread has written when the clock starts; at least ``LEAD_IN`` are.
        columns: columns that are timed.
    """

    threads: int
    groups: int
    prompt: int
    lattice_time: int
    columns: int

    @property
    def lead_in(self) -> int:
        return max(LEAD_IN, self.lattice_time)

    @property
    def max_new_tokens(self) -> int:
        return self.lead_in + self.columns

    def __str__(self) -> str:
        groups = f"{self.groups} × " if self.groups > 1 else ""
        return f"{groups}N={self.threads}, prompt {self.prompt}, time {self.lattice_time}"


class Decoding(Protocol):
    """One running decoding, its prompts computed."""

    def advance(self, columns: int) -> None:
        """Decode up to so many more columns; on CUDA without waiting for them."""

    def rollout(self) -> Rollout:
        """What has been decoded so far."""


class Decoder(Protocol):
    """What :class:`GroupDecoder` offers once the engines are merged."""

    def start(self, prompts: Sequence[Sequence[int]], num_threads: int, seeds: Sequence[int]) -> Decoding: ...


def make_decoder(model: ThreadedLM, max_new_tokens: int, engine: str) -> Decoder:
    """A decoder that samples at temperature 1 from the whole vocabulary and never ends early."""
    rules: dict[str, Any] = dict(eos_ids=[NEVER], pad_id=0)
    if hasattr(GroupDecoder, "start"):
        return cast(Decoder, GroupDecoder(model, Sampling(), max_new_tokens, engine=engine, **rules))  # type: ignore[call-arg]
    return _PlainDecoder(GroupDecoder(model, Sampling(), max_new_tokens, **rules))


# ------------------------------------------------- until GroupDecoder.start is merged: `plain`, column by column


class _PlainDecoder:
    def __init__(self, rules: GroupDecoder) -> None:
        self._rules = rules

    def start(self, prompts: Sequence[Sequence[int]], num_threads: int, seeds: Sequence[int]) -> Decoding:
        return _PlainDecoding(self._rules, prompts, num_threads, seeds)


class _PlainDecoding:
    @torch.no_grad()
    def __init__(
        self, rules: GroupDecoder, prompts: Sequence[Sequence[int]], num_threads: int, seeds: Sequence[int]
    ) -> None:
        device = next(rules.model.parameters()).device
        self._rules, self._num_threads = rules, num_threads
        self._prompt = left_pad(prompts, rules.pad_id, device)
        self._threads = _Threads(rules, len(prompts), num_threads, device)
        self._seeds = torch.tensor(list(seeds), device=device)
        self._columns: list[Any] = []
        self._logits: Iterator[Tensor] = rules._forward_passes(*self._prompt, num_threads, self._threads)
        self._next: Tensor | None = next(self._logits)

    @torch.no_grad()
    def advance(self, columns: int) -> None:
        for _ in range(columns):
            logits = next(self._logits) if self._next is None else self._next
            self._next = None
            time = len(self._columns)
            draw = self._rules.sampling.draw(logits, uniform(self._seeds, self._num_threads, time))
            self._columns.append(self._threads.write(time, draw, logits))

    def rollout(self) -> Rollout:
        return self._rules._rollout(*self._prompt, self._num_threads, self._columns, self._threads)
