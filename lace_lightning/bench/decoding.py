"""Groups that are decoded a few columns at a time: the one place where the benchmark meets the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from lace_lightning.decoding import GroupDecoder, Rollout, Sampling
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
    """What this package needs of a :class:`GroupDecoder`."""

    def start(self, prompts: Sequence[Sequence[int]], num_threads: int, seeds: Sequence[int]) -> Decoding: ...


def make_decoder(model: ThreadedLM, max_new_tokens: int, engine: str) -> Decoder:
    """A decoder that samples at temperature 1 from the whole vocabulary and never ends early."""
    rules: dict[str, Any] = dict(eos_ids=[NEVER], pad_id=0)
    if hasattr(GroupDecoder, "start"):
        return cast(Decoder, GroupDecoder(model, Sampling(), max_new_tokens, engine=engine, **rules))  # type: ignore[call-arg]
    from lace_lightning.bench.plain_decoding import PlainDecoder  # goes once GroupDecoder.start is merged

    return PlainDecoder(GroupDecoder(model, Sampling(), max_new_tokens, **rules))
