"""How far the exchange's gates stood open at each token that threads wrote."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lace_lightning.decoding.group import Group, Rollout
from lace_lightning.threaded_lm import ThreadedLM

CHUNK = 8
"""Groups per forward pass: a pass over whole threads needs more memory than decoding them."""


def token_gates(model: ThreadedLM, rollout: Rollout, groups: Sequence[Group]) -> list[list[tuple[float, ...]]] | None:
    """Mean gate over lattice layers and channels at every token of every thread, by one more forward pass.

    Returns:
        B lists of N tuples, one number per token as in ``Thread.token_ids``; None if no exchange records gates.
    """
    if not model.exchanges:
        return None
    chunks = [_chunk(model, rollout, start) for start in range(0, len(groups), CHUNK)]
    known = [chunk for chunk in chunks if chunk is not None]
    if len(known) < len(chunks):
        return None
    gates = torch.cat(known).tolist()
    return [
        [tuple(row[column] for column in thread.columns) for thread, row in zip(group.threads, rows, strict=True)]
        for group, rows in zip(groups, gates, strict=True)
    ]


def _chunk(model: ThreadedLM, rollout: Rollout, start: int) -> torch.Tensor | None:
    """(groups, N, T) mean gate over layers, of the columns after the prompt; None if none were recorded."""
    rows = slice(start, start + CHUNK)
    readings = model.read(rollout.input_ids[rows], rollout.attention_mask[rows], rollout.prompt_length)
    if not readings:
        return None
    columns = rollout.input_ids.shape[-1] - rollout.prompt_length
    return torch.stack([reading.gate[..., -columns:].float() for reading in readings]).mean(0)
