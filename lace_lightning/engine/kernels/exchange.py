"""One lattice layer's side path for one new column: rotary, cache append, attention over the lattice, gate.

Its input projection is one product: queries, keys, values and the part of the gate that sees Z are all linear in the
attention's output, so their weights are merged (see :mod:`lace_lightning.engine.weights`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lace_lightning.engine.kernels.attention import LOG2E
from lace_lightning.engine.kernels.launch import prefetch, sync


@triton.jit
def _partner(dim, TIME: tl.constexpr, THREAD: tl.constexpr):
    """The dim each dim turns with; its own sign is in the sine table."""
    in_time, in_thread = dim < TIME, (dim >= TIME) & (dim < TIME + THREAD)
    by_time = tl.where(dim < TIME // 2, dim + TIME // 2, dim - TIME // 2)
    by_thread = tl.where(dim < TIME + THREAD // 2, dim + THREAD // 2, dim - THREAD // 2)
    return tl.where(in_time, by_time, tl.where(in_thread, by_thread, dim))


@triton.jit
def _keys(q, m, mass, acc, k, v, readable, n, key_thread, scale, OWN: tl.constexpr):
    """Go on with an online softmax over a block of keys; ``readable`` is (queries, keys), an empty one keeps -inf."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    allowed = readable
    if OWN == "exclude":
        allowed = allowed & (key_thread[None, :] != n[:, None])
    if OWN == "only":
        allowed = allowed & (key_thread[None, :] == n[:, None])
    scores = tl.where(allowed, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, axis=1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    shrink = tl.exp2(m - base)
    p = tl.exp2(scores - base[:, None])
    mass = mass * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return m_new, mass, acc


@triton.jit
def _angles(n, t, time_cos, time_sin, thread_cos, thread_sin, N: tl.constexpr, D: tl.constexpr):
    """Cosines and signed sines (R, D) of threads n (R,) at lattice time t."""
    dim = tl.arange(0, D)
    inside, place = (n < N)[:, None], n[:, None] * D + dim[None, :]
    cos = tl.load(time_cos + t * D + dim)[None, :] * tl.load(thread_cos + place, mask=inside, other=0.0)
    sin = tl.load(time_sin + t * D + dim)[None, :] + tl.load(thread_sin + place, mask=inside, other=0.0)
    return cos, sin


@triton.jit
def _turned(inputs, rows, takes_part, cos, sin, D: tl.constexpr, TIME: tl.constexpr, THREAD: tl.constexpr):
    """(R, D): queries or keys at pointers ``rows`` (R,), turned by time and thread; zero where not written."""
    dim = tl.arange(0, D)
    partner, mask = _partner(dim, TIME, THREAD), takes_part[:, None]
    x = tl.load(rows[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32) * cos
    x += tl.load(rows[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32) * sin
    return x.to(inputs.dtype.element_ty)


@triton.jit
def exchange(
    inputs, cache_k, cache_v, hidden, written, time, time_cos, time_sin, thread_cos, thread_sin, w_gate, b_gate, out,
    part_acc, part_m, part_l, arrived, CAP, scale,
    N: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, TIME: tl.constexpr, THREAD: tl.constexpr,
    OWN: tl.constexpr, ALIGNED: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (B * N, r) = G * A_p of the fed column; grid (B * ceil(N / BLOCK_N), HEADS, PARTS).

    ``inputs`` (B * N, 4r) holds q, k, v and the gate's part of Z. Caches are (B, HEADS, CAP * N, D), time-major;
    ``hidden`` (B, CAP * N) is 0 where a position may be read and -inf elsewhere: float32, so that its loads run ahead.
    ``time`` (B,) counts columns; the fed one is the last.
    Of the programs that share BLOCK_N reading threads, the last one to finish joins their parts and heads, and gates.
    """
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    R: tl.constexpr = HEADS * D
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    b, first_thread = tile // TILES, tile % TILES * BLOCK_N
    n, dim = first_thread + tl.arange(0, BLOCK_N), tl.arange(0, D)
    rows, in_n = b * N + n, n < N
    t = tl.load(time + b) - 1
    takes_part = tl.load(written + rows, mask=in_n, other=0) != 0
    cache = (b.to(tl.int64) * HEADS + head) * CAP * N
    seen = b.to(tl.int64) * CAP * N
    begin, end = t * 0, t * 0
    if not ALIGNED:
        if WINDOW > 0:
            begin = tl.maximum(0, t - WINDOW + 1) * N
        size = tl.cdiv(tl.cdiv(t * N - begin, PARTS), BLOCK_T) * BLOCK_T
        begin += part * size
        end = tl.minimum(begin + size, t * N)
        key_bytes: tl.constexpr = D * (cache_k.dtype.element_ty.primitive_bitwidth // 8)
        prefetch(cache_k + (cache + begin) * D, (end - begin) * key_bytes, PDL)
        prefetch(cache_v + (cache + begin) * D, (end - begin) * key_bytes, PDL)
    prefetch(w_gate, first_thread * 0 + R * R * (w_gate.dtype.element_ty.primitive_bitwidth // 8), PDL)
    cos, sin = _angles(n, t, time_cos, time_sin, thread_cos, thread_sin, N, D)
    sync(PDL)
    q = _turned(inputs, inputs + rows.to(tl.int64) * (4 * R) + head * D, takes_part, cos, sin, D, TIME, THREAD)
    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, D), tl.float32)
    if part == 0:
        for first_key in range(0, N, BLOCK_N):
            key_thread = first_key + tl.arange(0, BLOCK_N)
            key_rows = b * N + key_thread
            readable = tl.load(written + key_rows, mask=key_thread < N, other=0) != 0
            source = inputs + key_rows.to(tl.int64) * (4 * R) + head * D
            key_cos, key_sin = _angles(key_thread, t, time_cos, time_sin, thread_cos, thread_sin, N, D)
            k = _turned(inputs, source + R, readable, key_cos, key_sin, D, TIME, THREAD)
            v = tl.load(source[:, None] + 2 * R + dim[None, :], mask=readable[:, None], other=0.0)
            if not ALIGNED:
                is_own = (key_thread < N) & (first_key == first_thread)
                place = (cache + t * N + key_thread)[:, None] * D + dim[None, :]
                tl.store(cache_k + place, k, mask=is_own[:, None])
                tl.store(cache_v + place, v, mask=is_own[:, None])
                tl.store(
                    hidden + seen + t * N + key_thread,
                    tl.where(readable, 0.0, float("-inf")),
                    mask=is_own & (head == 0),
                )
            m, mass, acc = _keys(
                q, m, mass, acc, k, v, readable[None, :] & in_n[:, None], n, key_thread, scale * LOG2E, OWN
            )
    if not ALIGNED:
        for first in range(begin, end, BLOCK_T):
            i = first + tl.arange(0, BLOCK_T)
            inside = i < end
            place = (cache + i)[:, None] * D + dim[None, :]
            k = tl.load(cache_k + place, mask=inside[:, None], other=0.0)
            v = tl.load(cache_v + place, mask=inside[:, None], other=0.0)
            readable = tl.load(hidden + seen + i, mask=inside, other=float("-inf")) == 0
            m, mass, acc = _keys(q, m, mass, acc, k, v, readable[None, :] & in_n[:, None], n, i % N, scale * LOG2E, OWN)
    own_place = rows[:, None].to(tl.int64) * R + head * D + dim[None, :]
    is_last = True
    if PARTS > 1:
        place = (rows.to(tl.int64) * HEADS + head) * PARTS + part
        tl.store(part_m + place, m, mask=in_n)
        tl.store(part_l + place, mass, mask=in_n)
        tl.store(part_acc + place[:, None] * D + dim[None, :], acc, mask=in_n[:, None])
        is_last = _arrives_last(arrived + tile * (HEADS + 1) + 1 + head, PARTS)
        if is_last:
            mass, acc = _joined(part_acc, part_m, part_l, rows, in_n, head, HEADS, D, PARTS)
    if is_last:
        # A_p; a thread that may read nothing gets exactly zero.
        read = tl.where(mass[:, None] > 0, acc / tl.where(mass > 0, mass, 1.0)[:, None], 0.0)
        tl.store(out + own_place, read.to(out.dtype.element_ty), mask=in_n[:, None])
        if _arrives_last(arrived + tile * (HEADS + 1), HEADS):
            _gate(inputs, written, w_gate, b_gate, out, b, n, N, HEADS, D, BLOCK_R)


@triton.jit
def _arrives_last(counter, EXPECTED: tl.constexpr):
    """Whether EXPECTED programs have now come here; what they stored before is then visible. Counts from zero again."""
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == EXPECTED - 1
    tl.debug_barrier()
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _joined(
    part_acc, part_m, part_l, rows, in_n, head, HEADS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Mass (R,) and accumulator (R, D) of one head over all PARTS partial softmaxes."""
    part, dim = tl.arange(0, PARTS), tl.arange(0, D)
    place = ((rows.to(tl.int64) * HEADS + head) * PARTS)[None, :] + part[:, None]
    m = tl.load(part_m + place, mask=in_n[None, :], other=float("-inf"), cache_modifier=".cg")
    mass = tl.load(part_l + place, mask=in_n[None, :], other=0.0, cache_modifier=".cg")
    at = place[:, :, None] * D + dim[None, None, :]
    acc = tl.load(part_acc + at, mask=in_n[None, :, None], other=0.0, cache_modifier=".cg")
    top = tl.max(m, axis=0)
    weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top)[None, :])
    return tl.sum(weight * mass, axis=0), tl.sum(acc * weight[:, :, None], axis=0)


@triton.jit
def exchange_column(
    inputs, written, time, time_cos, time_sin, thread_cos, thread_sin, w_gate, b_gate, out, scale,
    N: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, TIME: tl.constexpr, THREAD: tl.constexpr,
    OWN: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As :func:`exchange` within one column, all of a group in one program: for few threads, HEADS and D powers of two.

    A row is a (thread, head); heads see each other's keys and are kept apart by the mask.
    """
    b = tl.program_id(0)
    R: tl.constexpr = HEADS * D
    i, dim, r = tl.arange(0, BLOCK_N * HEADS), tl.arange(0, D), tl.arange(0, R)
    n, head = i // HEADS, i % HEADS
    rows = b * N + n
    t = tl.load(time + b) - 1
    takes_part = tl.load(written + rows, mask=n < N, other=0) != 0
    cos, sin = _angles(n, t, time_cos, time_sin, thread_cos, thread_sin, N, D)
    weight = tl.load(w_gate + r[:, None] * R + r[None, :])
    bias = tl.load(b_gate + r).to(tl.float32)
    thread = tl.arange(0, BLOCK_N)
    writes = tl.load(written + b * N + thread, mask=thread < N, other=0) != 0
    sync(PDL)
    source = inputs + rows.to(tl.int64) * (4 * R) + head * D
    q = _turned(inputs, source, takes_part, cos, sin, D, TIME, THREAD)
    k = _turned(inputs, source + R, takes_part, cos, sin, D, TIME, THREAD)
    v = tl.load(source[:, None] + 2 * R + dim[None, :], mask=takes_part[:, None], other=0.0)
    place = (b * N + thread)[:, None].to(tl.int64) * (4 * R) + 3 * R + r[None, :]
    from_z = tl.load(inputs + place, mask=(thread < N)[:, None], other=0.0).to(tl.float32)
    m = tl.full((BLOCK_N * HEADS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_N * HEADS,), tl.float32)
    acc = tl.zeros((BLOCK_N * HEADS, D), tl.float32)
    same_head = head[:, None] == head[None, :]
    m, mass, acc = _keys(q, m, mass, acc, k, v, takes_part[None, :] & same_head, n, n, scale * LOG2E, OWN)
    read = tl.where(mass[:, None] > 0, acc / tl.where(mass > 0, mass, 1.0)[:, None], 0.0).to(q.dtype)
    read = tl.reshape(read, (BLOCK_N, R))
    gate = tl.dot(read, tl.trans(weight), input_precision="ieee") + from_z + bias[None, :]
    gated = tl.where(writes[:, None], read.to(tl.float32) / (1 + tl.exp(-gate)), 0.0)
    place = (b * N + thread)[:, None].to(tl.int64) * R + r[None, :]
    tl.store(out + place, gated.to(out.dtype.element_ty), mask=(thread < N)[:, None])


@triton.jit
def _gate(
    inputs, written, w_gate, b_gate, out, b, n,
    N: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = G * A_p of threads ``n``, whose A_p stands in ``out``; W_g, (r, r), passes in blocks of its outputs."""
    R: tl.constexpr = HEADS * D
    BLOCK_G: tl.constexpr = min(BLOCK_R, 64)
    rows, r = b * N + n, tl.arange(0, BLOCK_R)
    in_n = n < N
    place = out + rows[:, None].to(tl.int64) * R
    read = tl.load(place + r[None, :], mask=in_n[:, None] & (r < R)[None, :], other=0.0, cache_modifier=".cg")
    takes_part = (tl.load(written + rows, mask=in_n, other=0) != 0)[:, None]
    from_z = inputs + rows[:, None].to(tl.int64) * (4 * R) + 3 * R
    for first in range(0, R, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        inside = in_n[:, None] & (g < R)[None, :]
        # W_g's rows that see A_p, and the gate's part of Z that the input projection has made.
        weight = tl.load(w_gate + g[:, None] * R + r[None, :], mask=(g < R)[:, None] & (r < R)[None, :], other=0.0)
        gate = tl.dot(read, tl.trans(weight), input_precision="ieee")
        gate += tl.load(from_z + g[None, :], mask=inside, other=0.0).to(tl.float32)
        gate += tl.load(b_gate + g, mask=g < R, other=0.0).to(tl.float32)[None, :]
        own = tl.load(place + g[None, :], mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        value = tl.where(takes_part, own / (1 + tl.exp(-gate)), 0.0)
        tl.debug_barrier()  # all have loaded what they read
        tl.store(place + g[None, :], value.to(out.dtype.element_ty), mask=inside)
