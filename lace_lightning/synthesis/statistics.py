"""What traces are like: how different their threads are, how tagged and how long (LACE.md §5, Table 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import torch

from lace_lightning.diversity import mean_cosine_distance, mean_edit_distance
from lace_lightning.embedding import Embedder
from lace_lightning.metrics.readings import ReadingMetrics
from lace_lightning.synthesis.compression import TokenCounter
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.collate import TraceCollator
from lace_lightning.traces.schema import Tag, Trace, TraceThread


def diversity(groups: Sequence[Sequence[str]], embedder: Embedder) -> dict[str, float | None]:
    """Mean over groups of texts of the mean pairwise distances; None without groups."""
    if not groups:
        return {"edit_distance": None, "embedding_dissimilarity": None}
    stripped = [[text.strip() for text in texts] for texts in groups]
    return {
        "edit_distance": fmean(mean_edit_distance(texts) for texts in stripped),
        "embedding_dissimilarity": fmean(_dissimilarity(texts, embedder) for texts in stripped),
    }


def trace_statistics(traces: Sequence[Trace], embedder: Embedder, counter: TokenCounter) -> dict[str, Any]:
    """Statistics of a trace file.

    Returns:
        ``num_traces``; ``num_threads`` (traces by thread count); ``diversity``, on what threads wrote themselves;
        ``tags`` (share of threads by tag); ``valid_tags`` (share of traces with exactly one best); ``strategies`` (mean
        share of a trace's threads with a strategy that no earlier one has); ``tokens`` (mean, median, largest).
    """
    threads = [thread for trace in traces for thread in trace.threads]
    tags = Counter(thread.tag for thread in threads)
    lengths = [counter.count(thread.text) for thread in threads]
    return {
        "num_traces": len(traces),
        "num_threads": _counts(len(trace.threads) for trace in traces),
        "diversity": diversity([[own_text(thread) for thread in trace.threads] for trace in traces], embedder),
        "tags": {str(tag): tags[tag] / len(threads) if threads else None for tag in Tag},
        "valid_tags": _mean([sum(t.tag is Tag.BEST for t in trace.threads) == 1 for trace in traces]),
        "strategies": _mean([len({t.strategy for t in trace.threads}) / len(trace.threads) for trace in traces]),
        "tokens": {"mean": _mean(lengths), "median": median(lengths or [0]), "largest": max(lengths, default=0)},
    }


def own_text(thread: TraceThread) -> str:
    """The thread's text without what an environment wrote."""
    edges = [0, *(edge for span in thread.forced for edge in span), len(thread.text)]
    return "".join(thread.text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))


def cross_ratio(model: ThreadedLM, collate: TraceCollator, traces: Sequence[Trace], batch_size: int = 8) -> float:
    """Share of lattice attention mass that lands on other threads when a model reads traces, mean over its layers."""
    readings = ReadingMetrics(model.layers, collate.num_threads, collate.max_length)
    device = next(model.parameters()).device
    for start in range(0, len(traces), batch_size):
        batch = collate([(trace, start) for trace in traces[start : start + batch_size]])
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        readings.update(model.read(ids, mask, batch.prompt_length), batch.segments[..., batch.prompt_length :])
    return float(readings.compute()["cross_ratio/mean"])


def _dissimilarity(texts: Sequence[str], embedder: Embedder) -> float:
    return float(mean_cosine_distance(embedder.embed(texts), torch.tensor([bool(text) for text in texts])))


def _counts(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
