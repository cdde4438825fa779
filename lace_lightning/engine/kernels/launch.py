"""What every kernel does around its work: ask early, wait, let the next one begin."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def sync(PDL: tl.constexpr):
    """Wait for the previous kernel, and let the next one begin."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(pointer, num_bytes, PDL: tl.constexpr):
    """Bring a contiguous range (16-byte aligned, a multiple of 16 bytes) into L2 without waiting for it."""
    if PDL:
        tl.inline_asm_elementwise(
            """{
            .reg .pred first, some; .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            setp.gt.and.s32 some, $2, 0, first;
            @some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [pointer.to(tl.int64), num_bytes.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
