"""Groups that are decoded a few columns at a time: the one place where the benchmark meets the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from lace_lightning.decoding import Decoding, Engine, GroupDecoder, Sampling
from lace_lightning.threaded_lm import ThreadedLM

if TYPE_CHECKING:
    from lace_lightning.bench.bench import Bench

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


def timed_start(bench: Bench, decoder: GroupDecoder, groups: int, threads: int, prompt: int) -> tuple[float, Decoding]:
    """Milliseconds of the prefill, and what stands before its first column."""
    prompts, started = bench.prompts(groups, prompt), []
    bench.clock.settle()
    milliseconds = bench.clock.milliseconds(
        lambda: started.append(decoder.start(prompts, threads, list(range(groups))))
    )
    return milliseconds, started[0]


def make_decoder(model: ThreadedLM, max_new_tokens: int, engine: str) -> GroupDecoder:
    """A decoder that samples at temperature 1 from the whole vocabulary and never ends early."""
    return GroupDecoder(model, Sampling(), max_new_tokens, [NEVER], pad_id=0, engine=cast(Engine, engine))
