"""`GroupDecoder` a few columns at a time, until its own `start` is merged; then this file goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lace_lightning.decoding import GroupDecoder, Rollout
from lace_lightning.decoding.decoder import _Threads, left_pad
from lace_lightning.decoding.random import uniform


class PlainDecoder:
    def __init__(self, rules: GroupDecoder) -> None:
        self._rules = rules

    def start(self, prompts: Sequence[Sequence[int]], num_threads: int, seeds: Sequence[int]) -> PlainDecoding:
        return PlainDecoding(self._rules, prompts, num_threads, seeds)


class PlainDecoding:
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
