"""Bytes around the output head when the loss is computed, where most runs have their peak."""

from __future__ import annotations

from lace_lightning.memory.run import Run

FUSED_CHUNK, SCORED_CHUNK = 4096, 2048
"""Tokens whose logits exist together, as in ``ThreadedLM.mean_nll`` and ``ThreadedLM.token_logprobs``."""


def hidden_states(run: Run) -> int:
    """Bytes of the last norm, of the decoder's output, and of the rows of it that are scored with their gradients."""
    shape, batch, precision = run.shape, run.training, run.precision
    assert batch is not None
    s, c, width = precision.residual, precision.compute, shape.hidden
    output = batch.attended * width * (4 + s * shape.learns_norms + s)
    rows = s + (c if precision.is_mixed else 0) + (c if run.head == "fused" else 0)
    return output + batch.positions * width * rows


def logits(run: Run) -> int:
    """Bytes of the chunks of logits that exist together."""
    shape, batch, c = run.shape, run.training, run.precision.compute
    assert batch is not None
    tokens = batch.positions
    if run.head == "scored":
        return 12 * min(tokens, SCORED_CHUNK) * shape.vocabulary  # log-softmax and two gradients, in float32
    chunk = min(tokens, FUSED_CHUNK) * shape.vocabulary
    if not run.on_cuda:
        return chunk * (4 * 4 + c + 1)  # uncompiled: logits, exponents and derivative in float32, and which is right
    # The chunk before holds its derivative while the next one's logits are made, and both while its own is.
    return chunk * c * (3 if tokens > FUSED_CHUNK else 2)


def matrix(run: Run) -> int:
    """Bytes of copies of the head's weights: their gradient, and with autocast a copy and a chunk's gradient."""
    shape, precision = run.shape, run.precision
    table = shape.vocabulary * shape.hidden
    gradient = precision.weights if shape.learns_head else 0
    copies = precision.compute * (1 + shape.learns_head) if precision.is_mixed else 0
    return table * (gradient + copies)
