"""Groups that are decoded a few columns at a time: the one place where the benchmark meets the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from lace_lightning.decoding import Engine, GroupDecoder, Sampling
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


def make_decoder(model: ThreadedLM, max_new_tokens: int, engine: str) -> GroupDecoder:
    """A decoder that samples at temperature 1 from the whole vocabulary and never ends early."""
    return GroupDecoder(model, Sampling(), max_new_tokens, [NEVER], pad_id=0, engine=cast(Engine, engine))
