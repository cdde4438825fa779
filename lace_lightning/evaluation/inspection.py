"""What stands at each token that threads wrote, how far the gates stood open there, and what it read from others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lace_lightning.decoding.gates import GateReader
from lace_lightning.decoding.group import Group, Rollout, Thread
from lace_lightning.decoding.segments import Segmenter
from lace_lightning.decoding.spelling import pieces_of
from lace_lightning.lattice import Reading
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 8
"""Groups per forward pass."""
MOST_READS = 3
"""Positions that are kept of all that a token read."""
SEGMENTS = "-pteag"
"""A letter for each :class:`~lace_lightning.traces.template.Segment`, by its number."""

Read = tuple[int, int, float]
"""Thread of the group, lattice time, and share of the reading token's attention mass."""


@dataclass(frozen=True)
class Inspection:
    """One thread, token by token.

    Args:
        thread: its index n in the group that it was decoded in.
        pieces: the text that each token adds.
        segments: a letter of ``SEGMENTS`` per token: thought, environment, assessment, tag.
        gates: mean gate over lattice layers and channels at each token; None where not recorded.
        reads: of each token the positions of other threads that it read most, at most ``MOST_READS``, the most first;
            None where not recorded.
    """

    thread: int
    pieces: tuple[str, ...]
    segments: str
    gates: tuple[float, ...] | None = None
    reads: tuple[tuple[Read, ...], ...] | None = None


class Inspector:
    """Takes threads apart.

    Args:
        template: spelling of openings and tags.
        tokenizer: with an end-of-sequence token.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self._segmenter = Segmenter(template, tokenizer)
        self._tokenizer = tokenizer

    def thread(self, n: int, thread: Thread, looked: Looked | None = None, index: int = 0) -> Inspection:
        """Thread n of a group: the one at ``index`` of those that were looked at."""
        pieces = pieces_of(thread.token_ids, lambda ids: str(self._tokenizer.decode(ids)))
        segments = "".join(SEGMENTS[segment] for segment in self._segmenter.thread(thread.token_ids, thread.forced))
        if looked is None:
            return Inspection(n, pieces, segments)
        return Inspection(n, pieces, segments, looked.gates_at(index, n, thread), looked.reads_at(index, n, thread))


@dataclass(frozen=True)
class Looked:
    """What one more forward pass says about B groups of N threads with T columns after the prompt.

    Args:
        gate: (B, N, T) mean over lattice layers.
        reads: (B, N, T, K, 3) thread, lattice time and share of the K most-read positions; None if not asked for.
    """

    gate: Tensor
    reads: Tensor | None

    def gates_at(self, index: int, n: int, thread: Thread) -> tuple[float, ...]:
        """The gate at each token of thread n of a group."""
        return tuple(self.gate[index, n, list(thread.columns)].tolist())

    def reads_at(self, index: int, n: int, thread: Thread) -> tuple[tuple[Read, ...], ...] | None:
        """What each token of thread n of a group read most."""
        if self.reads is None:
            return None
        return tuple(
            tuple((int(m), int(time), share) for m, time, share in token if share > 0)
            for token in self.reads[index, n, list(thread.columns)].tolist()
        )


def look(model: ThreadedLM, rollout: Rollout, groups: Sequence[Group], reads: bool = False) -> Looked | None:
    """Gates, and on request reads, at every column after the prompt, by one more forward pass.

    Returns:
        None if the model has no exchange with gates.
    """
    if not model.exchanges:
        return None
    size = 1 if reads else CHUNK  # the weights of all layers are held at once
    chunks = [rollout.part(slice(start, start + size)) for start in range(0, len(groups), size)]
    found = [looked for chunk in chunks if (looked := (_look if reads else _gates)(model, chunk)) is not None]
    if not found:
        return None
    kept = [chunk.reads for chunk in found if chunk.reads is not None]
    return Looked(torch.cat([chunk.gate for chunk in found]), torch.cat(kept) if kept else None)


def _look(model: ThreadedLM, rollout: Rollout) -> Looked | None:
    readings = model.read(rollout.input_ids, rollout.attention_mask, rollout.prompt_length, keep_weights=True)
    if not readings:
        return None
    columns = rollout.input_ids.shape[-1] - rollout.prompt_length
    gate = torch.stack([reading.gate[..., -columns:].float() for reading in readings]).mean(0)
    return Looked(gate.cpu(), most_read(readings, columns).cpu())


def _gates(model: ThreadedLM, rollout: Rollout) -> Looked | None:
    ids, mask, start = rollout.input_ids, rollout.attention_mask, rollout.prompt_length
    reader = GateReader(model, ids[:, 0, :start], mask[:, 0, :start], ids.shape[1])
    gate = reader.read(ids[..., start:], mask[..., start:])
    return None if gate is None else Looked(gate.cpu(), None)


def most_read(readings: Sequence[Reading], columns: int, most: int = MOST_READS) -> Tensor:
    """What each token reads most of other threads, by the mean over lattice layers of its attention weights.

    Args:
        readings: of all lattice layers, with weights.
        columns: T; earlier ones (a prompt that takes part) are left out, as columns to read from too.
        most: K, or fewer where there is less to read.

    Returns:
        (B, N, T, K, 3) float: thread, lattice time, and share of the token's whole attention mass; shares fall, and
        are 0 where nothing is left to read.
    """
    weights = torch.stack([reading.weights.float() for reading in readings if reading.weights is not None]).mean(0)
    batch, num_threads, total = readings[0].visible.shape
    own = torch.eye(num_threads, dtype=torch.bool, device=weights.device)
    if weights.shape[1] == num_threads:  # aligned: each column by itself, (B * T, N, N)
        by_column = weights.view(batch, total, num_threads, num_threads).masked_fill(own, 0)[:, -columns:]
        shares, threads = by_column.topk(min(most, num_threads), dim=-1)
        times = torch.arange(columns, device=weights.device)[:, None, None].expand_as(threads)
    else:
        cells = weights.view(batch, total, num_threads, total, num_threads).masked_fill(own[:, None], 0)
        cells = cells[:, -columns:, :, -columns:].flatten(3)  # (B, T, N, T * N)
        shares, keys = cells.topk(min(most, cells.shape[-1]), dim=-1)
        threads, times = keys % num_threads, keys // num_threads
    return torch.stack([threads, times, shares], dim=-1).transpose(1, 2)
