"""The end of a decoding step: embed, draw a token per thread, and say who writes, waits or has ended."""

from __future__ import annotations

import triton
import triton.language as tl

from lace_lightning.engine.kernels.launch import sync


@triton.jit
def embed(tokens, table, x, D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    """x (M, D) = table[tokens]."""
    sync(PDL)
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    token = tl.load(tokens + row)
    value = tl.load(table + token * D + d, mask=d < D)
    tl.store(x + row.to(tl.int64) * D + d, value, mask=d < D)


@triton.jit
def softmax_parts(logits, tops, sums, cooled, inverse_temperature, V, PARTS, BLOCK_V: tl.constexpr, PDL: tl.constexpr):
    """Per row and block of BLOCK_V logits: the largest, and the sums of exp(logit - largest), plain and cooled."""
    sync(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    v = part * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits + row.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    top = tl.max(x, axis=0)
    place = row * PARTS + part
    tl.store(tops + place, top)
    tl.store(sums + place, tl.sum(tl.exp(x - top), axis=0))
    tl.store(cooled + place, tl.sum(tl.exp((x - top) * inverse_temperature), axis=0))


@triton.jit
def _finalise(x):
    """The SplitMix64 mixing function, as in ``lace_lightning.decoding.random``; x is uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def draw(
    logits, tops, sums, cooled, inverse_temperature, seeds, time, drawn, logprobs, V, PARTS,
    N: tl.constexpr, GREEDY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One inverse-CDF draw per row and its log-probability at temperature 1: first the block, then the token in it."""
    sync(PDL)
    row = tl.program_id(0)
    b, n = row // N, row % N
    part = tl.arange(0, BLOCK_P)
    in_parts = part < PARTS
    top_of = tl.load(tops + row * PARTS + part, mask=in_parts, other=float("-inf"))
    top = tl.max(top_of, axis=0)
    total = tl.sum(tl.exp(top_of - top) * tl.load(sums + row * PARTS + part, mask=in_parts, other=0.0), axis=0)
    v = tl.arange(0, BLOCK_V)
    base = logits + row.to(tl.int64) * V
    if GREEDY:
        chosen = tl.argmax(top_of, axis=0)
        index = chosen * BLOCK_V + v
        token = chosen * BLOCK_V + tl.argmax(tl.load(base + index, mask=index < V, other=float("-inf")), axis=0)
    else:
        mass = tl.exp((top_of - top) * inverse_temperature).to(tl.float64)
        mass *= tl.load(cooled + row * PARTS + part, mask=in_parts, other=0.0).to(tl.float64)
        counter = (tl.load(time + b) * N + n + 1).to(tl.uint64)
        bits = _finalise(_finalise(tl.load(seeds + b).to(tl.uint64)) + counter * 0x9E3779B97F4A7C15)
        threshold = (bits >> 11).to(tl.float64) * 1.1102230246251565e-16 * tl.sum(mass, axis=0)  # 2**-53
        before = tl.cumsum(mass, axis=0)
        # The first block whose cumulative mass passes the threshold; rounding must not run past the last one with mass.
        last_with_mass = tl.max(tl.where(mass > 0, part, 0), axis=0)
        chosen = tl.minimum(tl.sum((before <= threshold).to(tl.int32), axis=0), last_with_mass)
        left = threshold - tl.sum(tl.where(part < chosen, mass, 0.0), axis=0)
        index = chosen * BLOCK_V + v
        x = tl.load(base + index, mask=index < V, other=float("-inf"))
        weight = tl.exp((x - top) * inverse_temperature).to(tl.float64)
        last_with_mass = tl.max(tl.where(weight > 0, v, 0), axis=0)
        inner = tl.minimum(tl.sum((tl.cumsum(weight, axis=0) <= left).to(tl.int32), axis=0), last_with_mass)
        token = chosen * BLOCK_V + inner
    tl.store(drawn + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.load(base + token) - top - tl.log(total))


@triton.jit
def advance(
    drawn, drawn_logprobs, tokens, written, due, opened, waiting, ended, own_length, time,
    out_tokens, out_written, out_forced, out_logprobs, eos, opening, pad, T,
    N: tl.constexpr, NUM_EOS: tl.constexpr, NUM_OPENING: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write one column of a group; the same rules as :class:`lace_lightning.decoding.threads.Threads`."""
    sync(PDL)
    b = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    rows = b * N + n
    inside = n < N
    t = tl.load(time + b)
    fed = tl.load(written + rows, mask=inside, other=0)
    length = tl.load(own_length + rows, mask=inside, other=0)
    tl.store(own_length + rows, length + fed, mask=inside)
    has_ended = tl.load(ended + rows, mask=inside, other=1) != 0
    writes = (tl.load(waiting + rows, mask=inside, other=1) == 0) & (has_ended == 0)
    wanted = tl.load(due + rows, mask=inside, other=-1)
    forced = writes & (wanted != -1)
    token = tl.where(forced, wanted, tl.load(drawn + rows, mask=inside, other=0))
    token = tl.where(writes, token, pad)
    tl.store(due + rows, tl.where(writes, -1, wanted), mask=inside)
    is_eos = token != token
    for i in tl.static_range(NUM_EOS):
        is_eos = is_eos | (token == tl.load(eos + i))
    has_ended = has_ended | (writes & is_eos)
    logprob = tl.where(writes & (forced == 0), tl.load(drawn_logprobs + rows, mask=inside, other=0.0), 0.0)
    place = rows.to(tl.int64) * T + t
    tl.store(out_tokens + place, token, mask=inside)
    tl.store(out_written + place, writes.to(tl.int8), mask=inside)
    tl.store(out_forced + place, forced.to(tl.int8), mask=inside)
    tl.store(out_logprobs + place, logprob, mask=inside)
    tl.store(tokens + rows, token, mask=inside)
    tl.store(written + rows, writes.to(tl.int8), mask=inside)
    tl.store(ended + rows, has_ended.to(tl.int8), mask=inside)
    if NUM_OPENING > 0:
        # Nobody waits before the opening: a thread's last tokens stand in the last columns.
        matches = writes & (token == tl.load(opening + NUM_OPENING - 1)) & (t >= NUM_OPENING - 1)
        for i in tl.static_range(1, NUM_OPENING):
            earlier = tl.load(out_tokens + place - i, mask=matches, other=-1)
            matches = matches & (earlier == tl.load(opening + NUM_OPENING - 1 - i))
        has_opened = matches | (tl.load(opened + rows, mask=inside, other=0) != 0)
        arrived = tl.min(tl.where(inside & (has_opened == 0) & (has_ended == 0), 0, 1), axis=0)
        tl.store(opened + rows, has_opened.to(tl.int8), mask=inside)
        tl.store(waiting + rows, (has_opened & (has_ended == 0) & (arrived == 0)).to(tl.int8), mask=inside)
    tl.debug_barrier()
    tl.store(time + b, t + 1)
