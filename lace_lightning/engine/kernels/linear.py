"""Thin matrix products: a few rows times whole weight matrices, bound by reading the weights once.

Each program owns BLOCK_O rows of a weight and asks for their first part before its input is ready, so the memory does not
idle between kernels. Weights go from memory straight to registers; with so few rows, plain multiply-adds keep up with it.

Letters: M rows of activations, K inputs, O outputs. Weights are (O, K), as in ``nn.Linear``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lace_lightning.engine.kernels.launch import sync


VECTOR: tl.constexpr = tl.constexpr(8)
"""Inputs that a thread loads and multiplies at once: 16 bytes of bfloat16."""


@triton.jit
def _weight_place(first, K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr):
    """Output rows o (1, BLOCK_O, 1, 1) and inputs k (1, 1, BLOCK_K / 8, 8) of a program's first step."""
    o = first + tl.arange(0, BLOCK_O)[None, :, None, None]
    k = (tl.arange(0, BLOCK_K // VECTOR) * VECTOR)[None, None, :, None] + tl.arange(0, VECTOR)[None, None, None, :]
    return o, k


@triton.jit
def _load_rows(x, norm, k, M, K: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr):
    """x (BLOCK_M, 1, BLOCK_K / 8, 8) in float32 at inputs k, and x * norm if NORM."""
    m = tl.arange(0, BLOCK_M)[:, None, None, None]
    rows = tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0.0).to(tl.float32)
    scaled = rows
    if NORM:
        scaled = rows * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    return rows, scaled


@triton.jit
def _times_slab(
    x, norm, w, first, O, M,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_O) = (x * norm) @ W[first : first + BLOCK_O]ᵀ, and the sums of x² (BLOCK_M, 1).

    The weights' first step is loaded before the previous kernel has ended (WAIT), each later one a step ahead.
    """
    o, k = _weight_place(first, K, BLOCK_O, BLOCK_K)
    place = w + o.to(tl.int64) * K + k
    ahead = tl.load(place, mask=(o < O) & (k < K), other=0.0, eviction_policy="evict_first")
    if WAIT:
        gdc_wait()
    acc = tl.zeros((BLOCK_M, BLOCK_O, BLOCK_K // VECTOR), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, BLOCK_K // VECTOR), tl.float32)
    for start in range(0, K, BLOCK_K):
        weight = ahead.to(tl.float32)
        following = start + BLOCK_K + k
        ahead = tl.load(
            place + start + BLOCK_K, mask=(o < O) & (following < K), other=0.0, eviction_policy="evict_first"
        )
        rows, scaled = _load_rows(x, norm, start + k, M, K, NORM, BLOCK_M)
        if NORM:
            squares += tl.sum(rows * rows, axis=3)
        acc += tl.sum(weight * scaled, axis=3)
    return tl.sum(acc, axis=2), tl.sum(squares, axis=2)


@triton.jit
def project(
    x, norm, eps, w0, w1, w2, b0, b1, b2, out, M,
    K: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, O0 + O1 + O2) = [RMSNorm] x @ [w0; w1; w2]ᵀ [+ bias]: up to three weights that share their input.

    The norm's division comes after the product: a row's scale needs all of the row, the product need not wait for it.
    """
    block = tl.program_id(0)
    w, b, first, size, offset = w0, b0, block * BLOCK_O, block * 0 + O0, block * 0
    blocks_0: tl.constexpr = (O0 + BLOCK_O - 1) // BLOCK_O
    if O1 > 0:
        blocks_1: tl.constexpr = (O1 + BLOCK_O - 1) // BLOCK_O
        if block >= blocks_0:
            w, b, first, size, offset = w1, b1, (block - blocks_0) * BLOCK_O, block * 0 + O1, block * 0 + O0
        if block >= blocks_0 + blocks_1:
            w, b = w2, b2
            first, size, offset = (block - blocks_0 - blocks_1) * BLOCK_O, block * 0 + O2, block * 0 + O0 + O1
    acc, squares = _times_slab(x, norm, w, first, size, M, K, NORM, BLOCK_M, BLOCK_O, BLOCK_K, PDL)
    if PDL:
        gdc_launch_dependents()
    if NORM:
        acc *= tl.rsqrt(squares / K + eps)
    o, m = first + tl.arange(0, BLOCK_O)[None, :], tl.arange(0, BLOCK_M)[:, None]
    if BIAS:
        acc += tl.load(b + o, mask=o < size, other=0.0).to(tl.float32)
    place = out + m * (O0 + O1 + O2) + offset + o
    tl.store(place, acc.to(out.dtype.element_ty), mask=(o < size) & (m < M))


@triton.jit
def project_add(
    x, w, x2, w2, residual, out, written, M,
    K: tl.constexpr, K2: tl.constexpr, O: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, O) = residual + x @ wᵀ [+ x2 @ w2ᵀ]; MASKED leaves rows alone that are not ``written``."""
    first = tl.program_id(0) * BLOCK_O
    acc, _ = _times_slab(x, x, w, first, O, M, K, False, BLOCK_M, BLOCK_O, BLOCK_K, PDL)
    if K2 > 0:
        more, _ = _times_slab(x2, x2, w2, first, O, M, K2, False, BLOCK_M, BLOCK_O, BLOCK_K2, False)
        acc += more
    if PDL:
        gdc_launch_dependents()
    o, m = first + tl.arange(0, BLOCK_O)[None, :], tl.arange(0, BLOCK_M)[:, None]
    inside = (o < O) & (m < M)
    acc += tl.load(residual + m * O + o, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        inside = inside & (tl.load(written + m, mask=m < M, other=0) != 0)
    tl.store(out + m * O + o, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def project_gated(
    x, norm, eps, w_gate, w_up, out, M,
    K: tl.constexpr, O: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, O) = silu(h @ w_gateᵀ) * (h @ w_upᵀ) with h = RMSNorm(x): the first half of the MLP."""
    first = tl.program_id(0) * BLOCK_O
    o, k = _weight_place(first, K, BLOCK_O, BLOCK_K)
    place = o.to(tl.int64) * K + k
    inside = (o < O) & (k < K)
    ahead_gate = tl.load(w_gate + place, mask=inside, other=0.0, eviction_policy="evict_first")
    ahead_up = tl.load(w_up + place, mask=inside, other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    gate = tl.zeros((BLOCK_M, BLOCK_O, BLOCK_K // VECTOR), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_O, BLOCK_K // VECTOR), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, BLOCK_K // VECTOR), tl.float32)
    for start in range(0, K, BLOCK_K):
        weight_gate, weight_up = ahead_gate.to(tl.float32), ahead_up.to(tl.float32)
        following = place + start + BLOCK_K
        inside = (o < O) & (start + BLOCK_K + k < K)
        ahead_gate = tl.load(w_gate + following, mask=inside, other=0.0, eviction_policy="evict_first")
        ahead_up = tl.load(w_up + following, mask=inside, other=0.0, eviction_policy="evict_first")
        rows, scaled = _load_rows(x, norm, start + k, M, K, True, BLOCK_M)
        squares += tl.sum(rows * rows, axis=3)
        gate += tl.sum(weight_gate * scaled, axis=3)
        up += tl.sum(weight_up * scaled, axis=3)
    if PDL:
        gdc_launch_dependents()
    inverse = tl.rsqrt(tl.sum(squares, axis=2) / K + eps)
    g, u = tl.sum(gate, axis=2) * inverse, tl.sum(up, axis=2) * inverse
    o, m = first + tl.arange(0, BLOCK_O)[None, :], tl.arange(0, BLOCK_M)[:, None]
    value = g / (1 + tl.exp(-g)) * u
    tl.store(out + m * O + o, value.to(out.dtype.element_ty), mask=(o < O) & (m < M))


@triton.jit
def rms_norm(x, norm, eps, out, D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    """out (M, D) = RMSNorm(x); one program per row."""
    sync(PDL)
    d = tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * D
    value = tl.load(x + row + d, mask=d < D, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
    value *= tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + row + d, value.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def silu_mul(gate_up, out, I: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out (M, I) = silu(gate_up[:, :I]) * gate_up[:, I:]."""
    sync(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
    tl.store(out + row * I + i, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=i < I)
