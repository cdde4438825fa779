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
    # The chunk before holds its derivative while the next one's logits are made, and both while its own is. A chunk's
    # gradient of the head is a tensor of its own under autocast, made when only this chunk's two are left.
    first = chunk * c * (3 if tokens > FUSED_CHUNK else 2)
    then = c * (2 * chunk + shape.vocabulary * shape.hidden * (run.precision.is_mixed and shape.learns_head))
    return max(first, then)


def matrix(run: Run) -> int:
    """Bytes of copies of the head's weights: their gradient, and with autocast a copy, and in GRPO another gradient."""
    shape, precision = run.shape, run.precision
    gradient = precision.weights if shape.learns_head else 0
    copies = 1 + (shape.learns_head and run.head == "scored") if precision.is_mixed else 0
    return shape.vocabulary * shape.hidden * (gradient + precision.compute * copies)
