"""Bytes of decoding: caches of prompt, threads and lattice, buffers of the engines, and sampling."""

from __future__ import annotations

from lace_lightning.memory.run import Decoding, Run

PROMPT_STEP = 64
"""The engine on CUDA pads prompts to multiples of this."""


def cached(run: Run, decoding: Decoding) -> dict[str, int]:
    """Bytes that stand while a batch is decoded; on CUDA the engine keeps them until another batch size comes."""
    return {
        "prompt and thread caches": _own(run, decoding),
        "lattice caches": _lattice(run, decoding),
        "logits and buffers": _buffers(run, decoding),
    }


def prefill(run: Run, decoding: Decoding) -> int:
    """Bytes of the pass over the prompts beside the caches: its own keys and values, and one layer's tensors."""
    shape, precision = run.shape, run.precision
    tokens = decoding.groups * decoding.prompt
    keys = 2 * shape.layers * shape.keys * tokens * precision.residual
    wide = max(3 * precision.compute * shape.inner, 8 * shape.hidden + precision.compute * (shape.queries + shape.keys))
    casts = precision.compute * (shape.backbone - shape.tables) if precision.is_mixed and shape.learns_linears else 0
    return keys + tokens * (wide + 2 * precision.residual * shape.hidden) + casts


def _own(run: Run, decoding: Decoding) -> int:
    """Keys and values of prompts, once per group on CUDA and else per thread, and of the threads."""
    per_column = run.shape.layers * run.shape.keys * _key_and_value_bytes(run, decoding)
    if decoding.engine != "graphs":
        return per_column * decoding.rows * (decoding.prompt + decoding.new)
    padded = -(-decoding.prompt // PROMPT_STEP) * PROMPT_STEP
    return per_column * (decoding.groups * padded + decoding.rows * decoding.new)


def _key_and_value_bytes(run: Run, decoding: Decoding) -> int:
    """Bytes of a number of a key and one of a value: engines make their caches like the weights.

    Rotary positions leave keys as wide as hidden states, and transformers widens the values beside them.
    """
    return 2 * (run.precision.residual if decoding.engine == "plain" else run.precision.weights)


def _lattice(run: Run, decoding: Decoding) -> int:
    lattice = run.shape.lattice
    if lattice is None or not lattice.keeps_keys:
        return 0
    positions = decoding.rows * decoding.new
    numbers = run.precision.compute if decoding.engine == "plain" else run.precision.weights
    per_position = 2 * len(lattice.layers) * lattice.width * numbers
    return positions * (per_position + 4)  # the mask of what may be read, in float32


def _buffers(run: Run, decoding: Decoding) -> int:
    shape, w, rows = run.shape, run.precision.weights, decoding.rows
    sampling = decoding.sampling
    truncates = sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
    # Probabilities, sorted values with their places, sums in float64.
    logits = rows * shape.vocabulary * (4 + (40 if truncates else 0))
    written = rows * decoding.new * 14  # ids, flags and log-probabilities of every column
    if decoding.engine != "graphs":
        return 2 * logits + written  # those before stand until the new ones are taken over
    wide = 3 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 3 * shape.inner
    tables = 2 * 4 * shape.head_dim * (decoding.prompt + decoding.new)
    merged = _merged(run)
    return logits + written + rows * wide * w + tables + merged


def _merged(run: Run) -> int:
    """The exchange's weights as the engine on CUDA merges them: (4r, D_a), (D, r) and (r, r) for each lattice layer."""
    lattice, shape = run.shape.lattice, run.shape
    if lattice is None:
        return 0
    r = lattice.width
    return len(lattice.layers) * run.precision.weights * (4 * r * shape.queries + r * shape.hidden + r * r)
