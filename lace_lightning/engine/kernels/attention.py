"""Attention of one new token per thread over the group's prompt and the thread's own earlier tokens.

The prompt's keys and values exist once per group, a thread's own ones once per thread. :func:`attend` reads both in
one program per thread and key head. Where that would leave the device idle or read a long prompt once per thread,
:func:`attend_parts` splits the keys, reads the prompt for many threads at once, and :func:`merge_parts` joins the
partial softmaxes exactly, by their log-sum-exps.

Letters: M = B * N rows (threads), H query heads, HKV key heads, G = H / HKV, D head width.
``qkv`` (M, (H + 2 HKV) * D) is unrotated; prompt caches are (B, HKV, P, D), own caches (M, HKV, CAP, D).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lace_lightning.engine.kernels.launch import prefetch, sync

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _rotated(rows, inside, norm, eps, cos, sin, position, NORM: tl.constexpr, D: tl.constexpr):
    """(R, D) float32: heads at pointers ``rows`` (R,), normalised if NORM, turned to ``position`` (R,)."""
    dim = tl.arange(0, D)
    partner = (dim + D // 2) % D
    x = tl.load(rows[:, None] + dim[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    y = tl.load(rows[:, None] + partner[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x = x * inverse * tl.load(norm + dim).to(tl.float32)[None, :]
        y = y * inverse * tl.load(norm + partner).to(tl.float32)[None, :]
    place = position[:, None] * D + dim[None, :]
    c = tl.load(cos + place, mask=inside[:, None], other=0.0)
    s = tl.load(sin + place, mask=inside[:, None], other=0.0)
    return x * c + tl.where(dim < D // 2, -y, y) * s


@triton.jit
def _over_keys(
    q, m, mass, acc, keys, values, start, end, scale, D: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Go on with an online softmax over keys start … end, stored (T, D)."""
    dim = tl.arange(0, D)
    for first in range(start, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = t < end
        place = t[:, None].to(tl.int64) * D + dim[None, :]
        k = tl.load(keys + place, mask=inside[:, None], other=0.0)
        v = tl.load(values + place, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        shrink = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[:, None])
        mass = mass * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = m_new
    return m, mass, acc


@triton.jit
def _append(
    qkv, k_norm, eps, cos, sin, own_k, own_v, row, kv, length, position, CAP,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store the thread's new key and value in slot ``length`` of its own cache; returns them (1, D).

    A thread that waits stores too, but its length does not grow: what it stored is overwritten, never read.
    """
    one = tl.arange(0, 1)
    dim = tl.arange(0, D)
    base = qkv + row.to(tl.int64) * ((H + 2 * HKV) * D)
    k = _rotated(base + (H + kv) * D + one, one == 0, k_norm, eps, cos, sin, position + one, NORM, D)
    k = k.to(own_k.dtype.element_ty)
    v = tl.load(base + (H + HKV + kv) * D + one[:, None] + dim[None, :])
    place = ((row.to(tl.int64) * HKV + kv) * CAP + length) * D + one[:, None] + dim[None, :]
    tl.store(own_k + place, k)
    tl.store(own_v + place, v)
    return k, v


@triton.jit
def attend(
    qkv, q_norm, k_norm, eps, cos, sin, prompt_k, prompt_v, prompt_start, P, own_k, own_v, own_length, CAP, out, scale,
    N: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, H * D); one program per thread and key head reads all of its keys; few are asked for EARLY."""
    row, kv = tl.program_id(0), tl.program_id(1)
    G: tl.constexpr = H // HKV
    b = row // N
    start, length = tl.load(prompt_start + b), tl.load(own_length + row)
    position = P - start + length
    prompt = (b.to(tl.int64) * HKV + kv) * P * D
    own = (row.to(tl.int64) * HKV + kv) * CAP * D
    key_bytes: tl.constexpr = D * (own_k.dtype.element_ty.primitive_bitwidth // 8)
    prefetch(prompt_k + prompt + start * D, (P - start) * key_bytes, PDL and EARLY)
    prefetch(prompt_v + prompt + start * D, (P - start) * key_bytes, PDL and EARLY)
    prefetch(own_k + own, length * key_bytes, PDL and EARLY)
    prefetch(own_v + own, length * key_bytes, PDL and EARLY)
    sync(PDL)
    k, v = _append(
        qkv, k_norm, eps, cos, sin, own_k, own_v, row, kv, length, position, CAP, H, HKV, D, NORM
    )  # fmt: skip
    g = tl.arange(0, BLOCK_Q)
    heads = qkv + row.to(tl.int64) * ((H + 2 * HKV) * D) + (kv * G + g) * D
    q = _rotated(heads, g < G, q_norm, eps, cos, sin, position + g * 0, NORM, D).to(k.dtype)
    m = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * (scale * LOG2E)
    mass = tl.full((BLOCK_Q,), 1.0, tl.float32)
    acc = tl.zeros((BLOCK_Q, D), tl.float32) + v.to(tl.float32)
    m, mass, acc = _over_keys(
        q, m, mass, acc, prompt_k + prompt, prompt_v + prompt, start, P, scale * LOG2E, D, BLOCK_T
    )
    m, mass, acc = _over_keys(q, m, mass, acc, own_k + own, own_v + own, 0, length, scale * LOG2E, D, BLOCK_T)
    dim = tl.arange(0, D)
    place = (row * H + kv * G + g)[:, None] * D + dim[None, :]
    tl.store(out + place, (acc / mass[:, None]).to(out.dtype.element_ty), mask=(g < G)[:, None])


@triton.jit
def attend_parts(
    qkv, q_norm, k_norm, eps, cos, sin, prompt_k, prompt_v, prompt_start, P, own_k, own_v, own_length, CAP,
    part_acc, part_m, part_l, scale, B,
    N: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    TILE_N: tl.constexpr, PROMPT_PARTS: tl.constexpr, OWN_PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_PQ: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial softmaxes: the first programs read a part of a prompt for TILE_N threads, the others of one thread."""
    sync(PDL)
    task, kv = tl.program_id(0), tl.program_id(1)
    TILES: tl.constexpr = (N + TILE_N - 1) // TILE_N
    num_prompt_tasks = B * TILES * PROMPT_PARTS
    if task < num_prompt_tasks:
        _prompt_part(
            qkv, q_norm, eps, cos, sin, prompt_k, prompt_v, prompt_start, P, own_length, part_acc, part_m, part_l,
            scale, task, kv, N, H, HKV, D, NORM, TILE_N, TILES, PROMPT_PARTS, OWN_PARTS, BLOCK_PQ, BLOCK_T,
        )  # fmt: skip
    else:
        _own_part(
            qkv, q_norm, k_norm, eps, cos, sin, prompt_start, P, own_k, own_v, own_length, CAP, part_acc, part_m,
            part_l, scale, task - num_prompt_tasks, kv, N, H, HKV, D, NORM, PROMPT_PARTS, OWN_PARTS, BLOCK_Q, BLOCK_T,
        )  # fmt: skip


@triton.jit
def _prompt_part(
    qkv, q_norm, eps, cos, sin, prompt_k, prompt_v, prompt_start, P, own_length, part_acc, part_m, part_l,
    scale, task, kv,
    N: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    TILE_N: tl.constexpr, TILES: tl.constexpr, PROMPT_PARTS: tl.constexpr, OWN_PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What TILE_N threads of a group read in one part of its prompt."""
    G: tl.constexpr = H // HKV
    b, part = task // (TILES * PROMPT_PARTS), task % PROMPT_PARTS
    i = tl.arange(0, BLOCK_Q)
    n = (task // PROMPT_PARTS) % TILES * TILE_N + i // G
    inside = (i < TILE_N * G) & (n < N)
    rows, head = b * N + n, kv * G + i % G
    start = tl.load(prompt_start + b)
    position = P - start + tl.load(own_length + rows, mask=inside, other=0)
    heads = qkv + rows.to(tl.int64) * ((H + 2 * HKV) * D) + head * D
    q = _rotated(heads, inside, q_norm, eps, cos, sin, position, NORM, D).to(qkv.dtype.element_ty)
    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    size = tl.cdiv(P - start, PROMPT_PARTS)
    first = start + part * size
    keys = (b.to(tl.int64) * HKV + kv) * P * D
    m, mass, acc = _over_keys(
        q, m, mass, acc, prompt_k + keys, prompt_v + keys, first, tl.minimum(first + size, P), scale * LOG2E, D, BLOCK_T
    )
    place = (rows.to(tl.int64) * H + head) * (PROMPT_PARTS + OWN_PARTS) + part
    _store_part(part_acc, part_m, part_l, place, inside, m, mass, acc, D)


@triton.jit
def _own_part(
    qkv, q_norm, k_norm, eps, cos, sin, prompt_start, P, own_k, own_v, own_length, CAP, part_acc, part_m, part_l,
    scale, task, kv,
    N: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    PROMPT_PARTS: tl.constexpr, OWN_PARTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What a thread reads in one part of its own past; the first part holds the new key too."""
    G: tl.constexpr = H // HKV
    row, part = task // OWN_PARTS, task % OWN_PARTS
    start, length = tl.load(prompt_start + row // N), tl.load(own_length + row)
    position = P - start + length
    g = tl.arange(0, BLOCK_Q)
    heads = qkv + row.to(tl.int64) * ((H + 2 * HKV) * D) + (kv * G + g) * D
    q = _rotated(heads, g < G, q_norm, eps, cos, sin, position + g * 0, NORM, D).to(qkv.dtype.element_ty)
    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    if part == 0:
        k, v = _append(
            qkv, k_norm, eps, cos, sin, own_k, own_v, row, kv, length, position, CAP, H, HKV, D, NORM
        )  # fmt: skip
        m = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * (scale * LOG2E)
        mass += 1.0
        acc += v.to(tl.float32)
    size = tl.cdiv(length, OWN_PARTS)
    keys = (row.to(tl.int64) * HKV + kv) * CAP * D
    last = tl.minimum((part + 1) * size, length)
    m, mass, acc = _over_keys(q, m, mass, acc, own_k + keys, own_v + keys, part * size, last, scale * LOG2E, D, BLOCK_T)
    place = (row.to(tl.int64) * H + kv * G + g) * (PROMPT_PARTS + OWN_PARTS) + PROMPT_PARTS + part
    _store_part(part_acc, part_m, part_l, place, g < G, m, mass, acc, D)


@triton.jit
def _store_part(part_acc, part_m, part_l, place, inside, m, mass, acc, D: tl.constexpr):
    dim = tl.arange(0, D)
    tl.store(part_m + place, m, mask=inside)
    tl.store(part_l + place, mass, mask=inside)
    tl.store(part_acc + place[:, None] * D + dim[None, :], acc, mask=inside[:, None])


@triton.jit
def merge_parts(
    part_acc, part_m, part_l, out, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """out (M * H, D) from PARTS partial softmaxes each; a part without keys has m = -inf and weighs nothing."""
    sync(PDL)
    place = tl.program_id(0).to(tl.int64) * PARTS
    part, dim = tl.arange(0, BLOCK_P), tl.arange(0, D)
    m = tl.load(part_m + place + part, mask=part < PARTS, other=float("-inf"))
    weight = tl.exp2(m - tl.max(m, axis=0))
    total = tl.sum(weight * tl.load(part_l + place + part, mask=part < PARTS, other=0.0), axis=0)
    acc = tl.load(part_acc + (place + part)[:, None] * D + dim[None, :], mask=(part < PARTS)[:, None], other=0.0)
    value = tl.sum(acc * weight[:, None], axis=0) / total
    tl.store(out + tl.program_id(0).to(tl.int64) * D + dim, value.to(out.dtype.element_ty))
