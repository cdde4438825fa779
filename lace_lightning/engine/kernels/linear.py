"""Thin matrix products: a few rows times whole weight matrices, bound by reading the weights once.

Each program owns BLOCK_O rows of a weight, a contiguous slab, and asks for all of it before its input is ready: the memory
does not idle between kernels.

Letters: M rows of activations, K inputs, O outputs. Weights are (O, K), as in ``nn.Linear``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _prefetch(pointer, num_bytes):
    """Bring a contiguous range (16-byte aligned, a multiple of 16 bytes) into L2 without waiting for it."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first; .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [pointer.to(tl.int64), num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _begin(w, first, num_rows, K: tl.constexpr, PDL: tl.constexpr):
    """Prefetch rows first … first + num_rows of a weight, let the next kernel begin too, wait for the previous one."""
    if PDL:
        _prefetch(w + first.to(tl.int64) * K, num_rows * (K * (w.dtype.element_ty.primitive_bitwidth // 8)))


@triton.jit
def _sync(PDL: tl.constexpr):
    """Let the next kernel begin, and wait for the previous one."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _products(
    acc, squares, x, norm, w, first, O, M,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_O, BLOCK_M) += W[first:] @ (x * norm)ᵀ and squares (BLOCK_M,) += the sums of x², over all K."""
    o = first + tl.arange(0, BLOCK_O)
    m = tl.arange(0, BLOCK_M)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_w, in_x = (o[:, None] < O), (m[None, :] < M)
        if K % BLOCK_K != 0:
            in_w, in_x = in_w & (k[None, :] < K), in_x & (k[:, None] < K)
        weight = tl.load(w + o[:, None].to(tl.int64) * K + k[None, :], mask=in_w, other=0.0)
        rows = tl.load(x + m[None, :] * K + k[:, None], mask=in_x, other=0.0)
        if NORM:
            wide = rows.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            scale = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
            rows = (wide * scale[:, None]).to(rows.dtype)
        acc = tl.dot(weight, rows, acc, input_precision="ieee")
    return acc, squares


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
    w, b, first, O, offset = w0, b0, block * BLOCK_O, block * 0 + O0, block * 0
    blocks_0: tl.constexpr = (O0 + BLOCK_O - 1) // BLOCK_O
    if O1 > 0:
        blocks_1: tl.constexpr = (O1 + BLOCK_O - 1) // BLOCK_O
        if block >= blocks_0:
            w, b, first, O, offset = w1, b1, (block - blocks_0) * BLOCK_O, block * 0 + O1, block * 0 + O0
        if block >= blocks_0 + blocks_1:
            w, b = w2, b2
            first, O, offset = (block - blocks_0 - blocks_1) * BLOCK_O, block * 0 + O2, block * 0 + O0 + O1
    _begin(w, first, tl.minimum(O - first, BLOCK_O), K, PDL)
    _sync(PDL)
    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    acc, squares = _products(acc, squares, x, norm, w, first, O, M, K, NORM, BLOCK_M, BLOCK_O, BLOCK_K)
    if NORM:
        acc *= tl.rsqrt(squares / K + eps)[None, :]
    o = first + tl.arange(0, BLOCK_O)
    m = tl.arange(0, BLOCK_M)
    if BIAS:
        acc += tl.load(b + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    inside = (o[:, None] < O) & (m[None, :] < M)
    tl.store(out + m[None, :] * (O0 + O1 + O2) + offset + o[:, None], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def project_add(
    x, w, x2, w2, residual, out, written, M,
    K: tl.constexpr, K2: tl.constexpr, O: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, O) = residual + x @ wᵀ [+ x2 @ w2ᵀ]; MASKED leaves rows alone that are not ``written``."""
    first = tl.program_id(0) * BLOCK_O
    num_rows = tl.minimum(O - first, BLOCK_O)
    _begin(w, first, num_rows, K, PDL)
    if K2 > 0:
        _begin(w2, first, num_rows, K2, PDL)
    _sync(PDL)
    o = first + tl.arange(0, BLOCK_O)
    m = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    if K2 > 0:
        acc, squares = _products(acc, squares, x2, x2, w2, first, O, M, K2, False, BLOCK_M, BLOCK_O, BLOCK_K2)
    acc, squares = _products(acc, squares, x, x, w, first, O, M, K, False, BLOCK_M, BLOCK_O, BLOCK_K)
    inside = (o[:, None] < O) & (m[None, :] < M)
    place = m[None, :] * O + o[:, None]
    acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        inside = inside & (tl.load(written + m, mask=m < M, other=0) != 0)[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def project_gated(
    x, norm, eps, w_gate, w_up, out, M,
    K: tl.constexpr, O: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, O) = silu(h @ w_gateᵀ) * (h @ w_upᵀ) with h = RMSNorm(x): the first half of the MLP."""
    first = tl.program_id(0) * BLOCK_O
    num_rows = tl.minimum(O - first, BLOCK_O)
    _begin(w_gate, first, num_rows, K, PDL)
    _begin(w_up, first, num_rows, K, PDL)
    _sync(PDL)
    o = first + tl.arange(0, BLOCK_O)
    m = tl.arange(0, BLOCK_M)
    gate = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_w, in_x = (o[:, None] < O), (m[None, :] < M)
        if K % BLOCK_K != 0:
            in_w, in_x = in_w & (k[None, :] < K), in_x & (k[:, None] < K)
        place = o[:, None].to(tl.int64) * K + k[None, :]
        weight_gate = tl.load(w_gate + place, mask=in_w, other=0.0)
        weight_up = tl.load(w_up + place, mask=in_w, other=0.0)
        rows = tl.load(x + m[None, :] * K + k[:, None], mask=in_x, other=0.0)
        wide = rows.to(tl.float32)
        squares += tl.sum(wide * wide, axis=0)
        scale = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        rows = (wide * scale[:, None]).to(rows.dtype)
        gate = tl.dot(weight_gate, rows, gate, input_precision="ieee")
        up = tl.dot(weight_up, rows, up, input_precision="ieee")
    inverse = tl.rsqrt(squares / K + eps)[None, :]
    gate, up = gate * inverse, up * inverse
    inside = (o[:, None] < O) & (m[None, :] < M)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + m[None, :] * O + o[:, None], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm(x, norm, eps, out, D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    """out (M, D) = RMSNorm(x); one program per row."""
    _sync(PDL)
    d = tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * D
    value = tl.load(x + row + d, mask=d < D, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
    value *= tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + row + d, value.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def silu_mul(gate_up, out, I: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out (M, I) = silu(gate_up[:, :I]) * gate_up[:, I:]."""
    _sync(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
    tl.store(out + row * I + i, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=i < I)
