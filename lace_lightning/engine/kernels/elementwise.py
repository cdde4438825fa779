"""What stands between the library's matrix products when there are many rows."""

from __future__ import annotations

import triton
import triton.language as tl

from lace_lightning.engine.kernels.launch import sync


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
def silu_mul(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out (M, WIDTH) = silu(gate_up[:, :WIDTH]) * gate_up[:, WIDTH:]."""
    sync(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + i, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=i < WIDTH)
