"""Bytes that autograd keeps from the forward pass for the backward pass, layer by layer.

Counted for decoders of the Llama family (norm, grouped attention, norm, gated MLP); others come near. Letters: D hidden
width, Q and K widths of queries and keys, I of the MLP, r of the lattice. Every term names the tensor that is kept.
"""

from __future__ import annotations

from lace_lightning.exchange.backends import MIN_BLOCKED
from lace_lightning.memory.run import Run


def kept_by_layer(run: Run, index: int) -> int:
    """Bytes that decoder layer ``index`` keeps without checkpointing; 0 below the first layer that gradients pass."""
    shape, batch = run.shape, run.training
    assert batch is not None
    if index < shape.first_with_gradient:
        return 0
    is_lattice = shape.lattice is not None and index in shape.lattice.layers
    attends = index > shape.first_with_gradient or shape.learns_linears or not is_lattice
    by_token = _norms_and_mlp(run, attends) + (_projections(run) if attends else 0)
    by_row = _attention(run) if attends else 0
    return batch.tokens * by_token + batch.attended * by_row + (_exchange(run) * batch.positions if is_lattice else 0)


def kept_by_checkpoint(run: Run, index: int) -> int:
    """Bytes of a checkpointed layer: its input."""
    assert run.training is not None
    is_passed = index >= run.shape.first_with_gradient
    return run.training.tokens * run.shape.hidden * run.precision.residual if is_passed else 0


def kept_by_all_layers(run: Run) -> int:
    """Bytes of all layers, and of the rotary tables and masks that they share."""
    assert run.training is not None
    kept = kept_by_checkpoint if run.checkpointing else kept_by_layer
    layers = sum(kept(run, index) for index in range(run.shape.layers))
    tables = 2 * run.shape.head_dim * run.precision.residual * run.training.attended
    mask = run.training.attended * run.training.columns if _has_mask(run) and run.checkpointing else 0
    return layers + tables + mask + _lattice_tables(run)


def largest_layer(run: Run) -> int:
    """Bytes that the layer with the most to keep keeps; what checkpointing recomputes at once."""
    return max(kept_by_layer(run, index) for index in range(run.shape.layers))


def casts(run: Run) -> int:
    """Bytes of the copies of layers' weights that autocast makes and products keep for the backward pass."""
    shape = run.shape
    if not run.precision.is_mixed or (run.compile and run.checkpointing):
        return 0  # in compiled layers no copy outlives its layer, unless the layer keeps it
    layers = shape.backbone - shape.tables
    if not shape.learns_linears:  # copies of frozen weights are kept where gradients pass
        layers = (shape.layers - shape.first_with_gradient) * shape.layer
        layers -= shape.hidden * (shape.queries + 2 * shape.keys)
        layers = 0 if run.checkpointing else layers
    return run.precision.compute * layers


def _norms_and_mlp(run: Run, has_first: bool) -> int:
    """Bytes per token of both norms with what the products after them take, and of the MLP."""
    shape, (c, s), count = run.shape, (run.precision.compute, run.precision.residual), 1 + has_first
    kept = 2 * c * shape.inner  # gate and up
    if run.compile:
        kept += count * (s * shape.hidden + 4)  # inputs; their scales
        inputs = count
    else:
        kept += count * (4 * shape.hidden + 4)  # inputs in float32; their scales
        kept += c * shape.inner  # silu(gate)
        kept += count * s * shape.hidden * shape.learns_norms  # normed, before the weight
        # Autocast makes a copy of its input for each product that takes it: two of the MLP, three of the attention.
        inputs = (2 + 3 * has_first) if run.precision.is_mixed else count
    if shape.learns_linears:
        kept += inputs * c * shape.hidden + c * shape.inner  # inputs of the products; of the last one
    return kept


def _projections(run: Run) -> int:
    """Bytes per token between the projections and the attention: what norms by head keep."""
    shape, precision = run.shape, run.precision
    if not shape.has_head_norms:
        return 0
    width, scales = shape.queries + shape.keys, 4 * (shape.queries + shape.keys) // shape.head_dim
    if run.compile:
        return precision.compute * width + scales
    return 4 * width + scales + precision.compute * width * shape.learns_norms  # in float32; normed, before the weight


def _attention(run: Run) -> int:
    """Bytes per token of the attention itself: queries, keys, values, output and log-sum-exp, or weights."""
    shape, batch, c = run.shape, run.training, run.precision.compute
    assert batch is not None
    keys = shape.queries if _has_mask(run) else shape.keys  # with a mask keys are repeated for all heads
    kept = c * (2 * shape.queries + 2 * keys)
    if batch.is_packed and shape.learns_linears:
        kept += c * shape.queries * batch.tokens // batch.attended  # packed again, for the output projection
    if run.attention == "eager":
        return kept + (4 if c == 4 else 4 + c) * shape.heads * batch.columns
    bias = c * batch.columns if _has_mask(run) else 0  # the mask as numbers to add, anew in each layer
    return kept + 4 * shape.heads + bias


def _has_mask(run: Run) -> bool:
    """Whether attention gets a mask over all pairs: transformers leaves it out where every column holds a token."""
    return run.training is not None and run.training.has_holes and run.attention in ("sdpa", "eager")


def _exchange(run: Run) -> int:
    """Bytes per lattice position of one block: masked input, what is added to, and a dozen tensors of width r."""
    shape, c = run.shape, run.precision.compute
    lattice = shape.lattice
    assert lattice is not None
    narrow = 12 * c * lattice.width + 4 * lattice.heads + c * _dense_keys(run)
    if lattice.site == "layer":
        return 2 * run.precision.residual * shape.hidden + narrow
    return (1 + shape.learns_linears) * c * shape.queries + narrow


def _dense_keys(run: Run) -> int:
    """Keys per position of the mask that an exchange adds to its scores; many positions on CUDA need none."""
    lattice, batch = run.shape.lattice, run.training
    assert lattice is not None and batch is not None
    queries = batch.threads * (batch.columns - batch.prompt)
    if run.on_cuda and (queries >= MIN_BLOCKED or not lattice.keeps_keys):
        return 0
    return queries if lattice.keeps_keys else batch.threads


def _lattice_tables(run: Run) -> int:
    """Bytes of the lattice's rotation, which its layers share and groups too."""
    lattice, batch = run.shape.lattice, run.training
    if lattice is None or batch is None:
        return 0
    return 2 * run.precision.compute * lattice.width * batch.positions // batch.groups
