"""Everything a batch of groups holds on the device while it is decoded, at fixed addresses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lace_lightning.decoding.environment import FREE
from lace_lightning.engine.weights import DecoderWeights


@dataclass(frozen=True)
class Capacity:
    """What the state has room for.

    Args:
        num_groups: B.
        num_threads: N.
        prompt: P, columns of the left-padded prompts.
        new: most columns after the prompt.
    """

    num_groups: int
    num_threads: int
    prompt: int
    new: int

    @property
    def rows(self) -> int:
        """M = B * N."""
        return self.num_groups * self.num_threads


class GroupState:
    """Caches, threads and outputs of B groups of N threads.

    The prompt's keys and values exist once per group. A thread's own ones stand without gaps: a column in which it did
    not write takes no room. The lattice's keys are time-major, (B, h, columns * N, d), with gaps that are hidden.
    Flags are int8, as the kernels store them.
    """

    def __init__(self, weights: DecoderWeights, capacity: Capacity, pad_id: int) -> None:
        self.capacity = capacity
        b, n, m, new = capacity.num_groups, capacity.num_threads, capacity.rows, capacity.new
        like = weights.embedding
        heads, dim, num_layers = weights.num_key_heads, weights.head_dim, len(weights.layers)
        self.prompt_k, self.prompt_v = like.new_zeros(2, num_layers, b, heads, capacity.prompt, dim)
        self.own_k, self.own_v = like.new_zeros(2, num_layers, m, heads, new, dim)
        self.lattice = {
            i: like.new_zeros(2, b, side.config.heads, new * n, side.config.dim)
            for i, side in weights.sides.items()
            if side.config.scope != "aligned"
        }
        integers = {"dtype": torch.int32, "device": like.device}
        flags = {"dtype": torch.int8, "device": like.device}
        self.hidden = torch.zeros(b, new * n, device=like.device)  # 0 where a lattice position may be read, else -inf
        self.prompt_start = torch.zeros(b, **integers)
        self.own_length = torch.zeros(b, n, **integers)
        self.time = torch.zeros(b, **integers)
        self.seeds = torch.zeros(b, dtype=torch.long, device=like.device)
        self.held = like.new_zeros(m, like.shape[1])  # what each thread knew when it wrote its last token
        self.tokens = torch.full((b, n), pad_id, device=like.device)
        self.due = torch.full((b, n), FREE, device=like.device)
        self.written, self.opened, self.waiting, self.ended = torch.zeros(4, b, n, **flags)
        self.out_tokens = torch.full((b, n, new), pad_id, device=like.device)
        self.out_written, self.out_forced = torch.zeros(2, b, n, new, **flags)
        self.out_logprobs = torch.zeros(b, n, new, device=like.device)

    @property
    def mutable(self) -> list[Tensor]:
        """What a step changes and must be put back after a trial step; slots of caches and outputs need not be."""
        return [
            self.own_length, self.time, self.held, self.tokens, self.due, self.written, self.opened, self.waiting,
            self.ended,
        ]  # fmt: skip

    def reset(self, pad_id: int) -> None:
        for tensor in (self.own_length, self.time, self.written, self.opened, self.waiting, self.ended):
            tensor.zero_()
        self.tokens.fill_(pad_id)
        self.due.fill_(FREE)

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes of the caches, by kind."""
        caches = {
            "prompt": [self.prompt_k, self.prompt_v],
            "own": [self.own_k, self.own_v],
            "lattice": [*self.lattice.values(), self.hidden],
        }
        return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in caches.items()}
