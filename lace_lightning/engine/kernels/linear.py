"""Thin matrix products: up to 16 rows times whole weight matrices, bound by reading the weights once.

A program owns 16 rows of a weight, and its warps share out the inputs. Tensor cores sum over inputs in any order, as
long as both operands agree on it: so a thread takes 16 contiguous bytes of a weight row straight from memory into the
registers that the tensor core reads, without a detour through shared memory. The first step's weights are asked for
before the previous kernel has ended, so memory does not idle between kernels.

Written in Gluon, Triton's dialect with explicit layouts. Letters: M rows of activations, K inputs, O outputs, W warps.
Weights are (O, K), as in ``nn.Linear``; K is a multiple of 8 W, O of 16.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def _indices(A: gl.constexpr, B: gl.constexpr, C: gl.constexpr, layout: gl.constexpr):
    """Indices of the three dims of an (A, B, C) tensor, each broadcastable to it."""
    a = gl.arange(0, A, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None][:, :, None]
    b = gl.arange(0, B, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :][:, :, None]
    c = gl.arange(0, C, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, :][:, None, :]
    return a, b, c


@gluon.jit
def _load_weights(
    w, first, start: gl.constexpr, K: gl.constexpr, W: gl.constexpr, STEP: gl.constexpr
):  # fmt: skip
    """(W, 16, STEP) of rows first …: each warp's inputs from ``start`` on in its own share."""
    layout: gl.constexpr = gl.DotOperandLayout(
        0, gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8]), 8
    )
    SHARE: gl.constexpr = K // W
    warp, o, k = _indices(W, 16, STEP, layout)
    place = w + first.to(gl.int64) * K + (o * K + warp * SHARE + (start + k))
    if start + STEP <= SHARE:
        return gl.load(place)
    return gl.load(place, mask=(start + k + o * 0 + warp * 0) < SHARE, other=0.0)


@gluon.jit
def _load_rows(
    x, norm, M, start: gl.constexpr, K: gl.constexpr, NORM: gl.constexpr, BLOCK_M: gl.constexpr, W: gl.constexpr,
    STEP: gl.constexpr,
):  # fmt: skip
    """(W, STEP, BLOCK_M) of x [* norm] in its own dtype, and the sums of x² (W, BLOCK_M) in float32."""
    layout: gl.constexpr = gl.DotOperandLayout(
        1, gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8]), 8
    )
    SHARE: gl.constexpr = K // W
    warp, k, m = _indices(W, STEP, BLOCK_M, layout)
    inside = (m + (start + k) * 0 + warp * 0 < M) & (start + k + m * 0 + warp * 0 < SHARE)
    place = warp * SHARE + (start + k) + m * 0
    rows = gl.load(x + place + m * K, mask=inside, other=0.0)
    wide = rows.to(gl.float32)
    squares = gl.sum(wide * wide, axis=1)
    if NORM:
        scale = gl.load(norm + place, mask=inside, other=0.0).to(gl.float32)
        rows = (wide * scale).to(rows.dtype)
    return rows, squares


@gluon.jit
def _times_slab(
    x, norm, w, first, M, K: gl.constexpr, NORM: gl.constexpr, BLOCK_M: gl.constexpr, W: gl.constexpr,
    STEP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """W[first : first + 16] @ (x * norm)ᵀ and sums of x² over each warp's inputs: (W, 16, BLOCK_M), (W, BLOCK_M)."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8])
    weight = _load_weights(w, first, 0, K, W, STEP)
    if PDL:
        gdc_wait()
    acc = gl.zeros((W, 16, BLOCK_M), gl.float32, mma)
    squares = gl.zeros((W, BLOCK_M), gl.float32, gl.SliceLayout(1, gl.DotOperandLayout(1, mma, 8)))
    for start in gl.static_range(0, K // W, STEP):
        if start + STEP < K // W:
            ahead = _load_weights(w, first, start + STEP, K, W, STEP)
        rows, more = _load_rows(x, norm, M, start, K, NORM, BLOCK_M, W, STEP)
        squares += more
        acc = mma_v2(weight, rows, acc)
        if start + STEP < K // W:
            weight = ahead
    return acc, squares


@gluon.jit
def _total(squares, mma: gl.constexpr):
    """Sums over warps, (1, BLOCK_M) in the layout of a summed product."""
    return gl.convert_layout(gl.sum(squares, axis=0), gl.SliceLayout(0, gl.SliceLayout(0, mma)))[None, :]


@gluon.jit
def _outputs(first, BLOCK_M: gl.constexpr, W: gl.constexpr):
    """Output indices o (16, 1) and row indices m (1, BLOCK_M) of a summed product."""
    layout: gl.constexpr = gl.SliceLayout(
        0, gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8])
    )
    o = first + gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    return o, gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def project(
    x, norm, eps, w0, w1, w2, b0, b1, b2, out, M,
    K: gl.constexpr, O0: gl.constexpr, O1: gl.constexpr, O2: gl.constexpr, NORM: gl.constexpr, BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, W: gl.constexpr, STEP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out (M, O0 + O1 + O2) = [RMSNorm] x @ [w0; w1; w2]ᵀ [+ bias]: up to three weights that share their input.

    The norm's division comes after the product: a row's scale needs all of the row, the product need not wait for it.
    """
    block = gl.program_id(0)
    w, b, first, offset = w0, b0, block * 16, block * 0
    if O1 > 0:
        if block >= O0 // 16:
            w, b, first, offset = w1, b1, block * 16 - O0, block * 0 + O0
        if block >= (O0 + O1) // 16:
            w, b, first, offset = w2, b2, block * 16 - O0 - O1, block * 0 + O0 + O1
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8])
    parts, squares = _times_slab(x, norm, w, first, M, K, NORM, BLOCK_M, W, STEP, PDL)
    if PDL:
        gdc_launch_dependents()
    acc = gl.sum(parts, axis=0)
    if NORM:
        acc = acc * gl.rsqrt(_total(squares, mma) / K + eps)
    o, m = _outputs(first, BLOCK_M, W)
    if BIAS:
        acc += gl.load(b + o).to(gl.float32)
    place = out + m * (O0 + O1 + O2) + offset + o
    gl.store(place, acc.to(out.dtype.element_ty), mask=m + o * 0 < M)


@gluon.jit
def project_add(
    x, w, x2, w2, residual, out, written, M,
    K: gl.constexpr, K2: gl.constexpr, OUTS: gl.constexpr, MASKED: gl.constexpr,
    BLOCK_M: gl.constexpr, W: gl.constexpr, STEP: gl.constexpr, STEP2: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out (M, OUTS) = residual + x @ wᵀ [+ x2 @ w2ᵀ]; MASKED leaves rows alone that are not ``written``."""
    first = gl.program_id(0) * 16
    if K2 > 0:
        weight2 = _load_weights(w2, first, 0, K2, W, STEP2)
    parts, _ = _times_slab(x, x, w, first, M, K, False, BLOCK_M, W, STEP, PDL)
    if K2 > 0:
        rows2, _ = _load_rows(x2, x2, M, 0, K2, False, BLOCK_M, W, STEP2)
        parts = mma_v2(weight2, rows2, parts)
    if PDL:
        gdc_launch_dependents()
    acc = gl.sum(parts, axis=0)
    o, m = _outputs(first, BLOCK_M, W)
    inside = m + o * 0 < M
    acc += gl.load(residual + m * OUTS + o, mask=inside, other=0.0).to(gl.float32)
    if MASKED:
        inside = inside & (gl.load(written + m + o * 0, mask=inside, other=0) != 0)
    gl.store(out + m * OUTS + o, acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def project_gated(
    x, norm, eps, w_gate, w_up, out, M,
    K: gl.constexpr, OUTS: gl.constexpr,
    BLOCK_M: gl.constexpr, W: gl.constexpr, STEP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out (M, OUTS) = silu(h @ w_gateᵀ) * (h @ w_upᵀ) with h = RMSNorm(x): the first half of the MLP."""
    first = gl.program_id(0) * 16
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8])
    weight_gate = _load_weights(w_gate, first, 0, K, W, STEP)
    weight_up = _load_weights(w_up, first, 0, K, W, STEP)
    if PDL:
        gdc_wait()
    gate = gl.zeros((W, 16, BLOCK_M), gl.float32, mma)
    up = gl.zeros((W, 16, BLOCK_M), gl.float32, mma)
    squares = gl.zeros((W, BLOCK_M), gl.float32, gl.SliceLayout(1, gl.DotOperandLayout(1, mma, 8)))
    for start in gl.static_range(0, K // W, STEP):
        if start + STEP < K // W:
            ahead_gate = _load_weights(w_gate, first, start + STEP, K, W, STEP)
            ahead_up = _load_weights(w_up, first, start + STEP, K, W, STEP)
        rows, more = _load_rows(x, norm, M, start, K, True, BLOCK_M, W, STEP)
        squares += more
        gate = mma_v2(weight_gate, rows, gate)
        up = mma_v2(weight_up, rows, up)
        if start + STEP < K // W:
            weight_gate, weight_up = ahead_gate, ahead_up
    if PDL:
        gdc_launch_dependents()
    inverse = gl.rsqrt(_total(squares, mma) / K + eps)
    g, u = gl.sum(gate, axis=0) * inverse, gl.sum(up, axis=0) * inverse
    o, m = _outputs(first, BLOCK_M, W)
    value = g / (1 + gl.exp(-g)) * u
    gl.store(out + m * OUTS + o, value.to(out.dtype.element_ty), mask=m + o * 0 < M)
