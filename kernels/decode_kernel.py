"""Attention of rows of one token over paged keys and values, compiled: each is read where it lies, once.

The work is a list of pieces, each some positions of one row's context. A piece has a softmax of its own, and a row's
pieces are put together by their largest scores and their sums ("flash decoding"). Pieces begin at multiples of `PIECE`
positions, so that a row's result depends neither on the other rows nor on the number of threads.
"""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64
from functools import cache

import numpy as np
import torch
from numba import carray, njit

from kvferry.kernels.native import (
    FAST,
    Kernel,
    barrier,
    bfloats_at,
    float_of_bits,
    floats_at,
    halves_at,
    integers_at,
    lanes,
    reads_halves,
    record_at,
    thread,
    threads,
    wide,
)
from kvferry.kernels.vectors import onward, products, weighted

PIECE = 512
AHEAD = 2  # blocks
TOGETHER = 4  # keys
LANES = lanes()
WIDE = 4  # vectors of a value that are added at once
f32, i32 = np.float32, np.int32
LEAST = np.finfo(np.float32).min


class Call(Structure):
    """What the kernel is given; names of arrays are their addresses."""

    _fields_ = (
        ("rows", c_int64),
        ("kv_heads", c_int64),
        ("group", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("block_stride", c_int64),  # elements from a block to the next
        ("head_stride", c_int64),  # elements from a block's KV head to the next
        ("keys", c_int64),  # a layer's, in the first block; its values are behind them
        ("query", c_int64),  # fp32 [rows, kv_heads, group, head_dim], scaled
        ("out", c_int64),  # fp32, of the same shape
        ("count", c_int64),
        ("pieces", c_int64),  # int64 [count, 3]: row, first position, position after the last
        ("first", c_int64),  # int64 [rows + 1]: where each row's pieces begin
        ("width", c_int64),
        ("tables", c_int64),  # int64 [rows, width]
        ("partial", c_int64),  # fp32 [count, kv_heads, group, head_dim + 2], to work with
        ("scratch", c_int64),  # fp32 [threads, scratch_floats(group, head_dim)], to work with
        ("sinks", c_int64),  # fp32 [kv_heads, group], or 0
        ("softcap", c_float),  # or 0
    )


call_at = record_at(Call)


@cache
def decode_kernel(dtype: torch.dtype) -> Kernel:
    """The kernel for a pool of this dtype, one of `ENTRIES`; it takes a `Call`."""
    return Kernel(ENTRIES[dtype])


def scratch_floats(group: int, head_dim: int) -> int:
    """What a thread needs: a piece's scores, and a sum of values a query head."""
    return group * (PIECE + head_dim)


@njit(fastmath=FAST)
def exp(x):
    """e^x in fp32 for x up to 88, by the polynomial of Cephes' expf; 0 or next to it below -87; NaN for NaN."""
    x = f32(-87.0) if x < f32(-87.0) else x
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return (p * r * r + r + f32(1.0)) * float_of_bits((i32(n) + i32(127)) << i32(23))


@njit(fastmath=FAST)
def cap(scores, softcap):
    """`softcap * tanh(s / softcap)`, in place."""
    for i in range(len(scores)):
        x = f32(2.0) * scores[i] / softcap
        x = f32(40.0) if x > f32(40.0) else x
        scores[i] = softcap * (f32(1.0) - f32(2.0) / (exp(x) + f32(1.0)))


@njit(fastmath=FAST)
def largest(scores):
    """The largest one that is a number, and finite; NaN is passed over: the sum of the weights will tell."""
    most = LEAST
    whole = len(scores) // 8 * 8
    m0 = m1 = m2 = m3 = m4 = m5 = m6 = m7 = LEAST
    for i in range(0, whole, 8):
        m0 = scores[i] if scores[i] > m0 else m0
        m1 = scores[i + 1] if scores[i + 1] > m1 else m1
        m2 = scores[i + 2] if scores[i + 2] > m2 else m2
        m3 = scores[i + 3] if scores[i + 3] > m3 else m3
        m4 = scores[i + 4] if scores[i + 4] > m4 else m4
        m5 = scores[i + 5] if scores[i + 5] > m5 else m5
        m6 = scores[i + 6] if scores[i + 6] > m6 else m6
        m7 = scores[i + 7] if scores[i + 7] > m7 else m7
    for i in range(whole, len(scores)):
        most = scores[i] if scores[i] > most else most
    for other in (m0, m1, m2, m3, m4, m5, m6, m7):
        most = other if other > most else most
    return most


@njit(fastmath=FAST)
def weigh(scores, most):
    """Scores to weights, in place; their sum."""
    total = f32(0)
    for i in range(len(scores)):
        weight = exp(scores[i] - most)
        scores[i] = weight
        total += weight
    return total


score_4, score_3, score_2, score_1 = (products(TOGETHER, few) for few in (4, 3, 2, 1))
score_one = products(1, 1)
add_4, add_3, add_2, add_1 = (weighted(few, WIDE) for few in (4, 3, 2, 1))
add_narrow = weighted(1, 1)


@njit(fastmath=FAST)
def score(query, keys, count, scores, group, dim, later):
    """`scores[g * PIECE + i]` of `count` keys in a row. `later`: those that are read next."""
    whole = count - count % TOGETHER
    for i in range(0, whole, TOGETHER):
        own, ahead = onward(keys, i * dim), onward(later, i * dim)
        g = 0
        while group - g >= 4:
            score_4(own, onward(query, g * dim), dim, onward(scores, g * PIECE + i), PIECE, ahead)
            g += 4
        if group - g == 3:
            score_3(own, onward(query, g * dim), dim, onward(scores, g * PIECE + i), PIECE, ahead)
        elif group - g == 2:
            score_2(own, onward(query, g * dim), dim, onward(scores, g * PIECE + i), PIECE, ahead)
        elif group - g == 1:
            score_1(own, onward(query, g * dim), dim, onward(scores, g * PIECE + i), PIECE, ahead)
    for i in range(whole, count):
        for g in range(group):
            own = onward(keys, i * dim)
            score_one(own, onward(query, g * dim), dim, onward(scores, g * PIECE + i), PIECE, own)


@njit(fastmath=FAST)
def add(weights, values, count, sums, group, dim, later):
    """Add `count` values in a row, times `weights[g * PIECE + i]`, to `sums[g * dim + d]`."""
    d = 0
    while dim - d >= WIDE * LANES:
        own, ahead = onward(values, d), onward(later, d)
        g = 0
        while group - g >= 4:
            add_4(own, dim, count, onward(weights, g * PIECE), PIECE, onward(sums, g * dim + d), ahead)
            g += 4
        if group - g == 3:
            add_3(own, dim, count, onward(weights, g * PIECE), PIECE, onward(sums, g * dim + d), ahead)
        elif group - g == 2:
            add_2(own, dim, count, onward(weights, g * PIECE), PIECE, onward(sums, g * dim + d), ahead)
        elif group - g == 1:
            add_1(own, dim, count, onward(weights, g * PIECE), PIECE, onward(sums, g * dim + d), ahead)
        d += WIDE * LANES
    while dim - d >= LANES:
        own, ahead = onward(values, d), onward(later, d)
        for g in range(group):
            add_narrow(own, dim, count, onward(weights, g * PIECE), PIECE, onward(sums, g * dim + d), ahead)
        d += LANES
    for g in range(group):
        for i in range(count):
            for left in range(d, dim):
                sums[g * dim + left] += weights[g * PIECE + i] * wide(values[i * dim + left])


@njit(fastmath=FAST)
def span(page, table, begin, end, sizes):
    """What of a block lies between two positions: the element that it begins with, that of the block to be fetched
    meanwhile, how many positions, and the first one's distance from `begin`."""
    _, dim, block_size, block, head = sizes
    left, right = max(begin, page * block_size), min(end, (page + 1) * block_size)
    ahead = min(page + AHEAD, (end - 1) // block_size)
    at = table[page] * block + head + (left - page * block_size) * dim
    return at, table[ahead] * block + head, right - left, left - begin


@njit(fastmath=FAST)
def attend(query, keys, values, table, begin, end, sizes, softcap, scratch, partial):
    """One piece of one KV head, to `partial[group, dim + 2]`: sums, the largest score, the weights' sum."""
    group, dim, block_size = sizes[:3]
    scores, sums = scratch, onward(scratch, group * PIECE)
    pages = range(begin // block_size, (end - 1) // block_size + 1)
    for page in pages:
        at, later, count, place = span(page, table, begin, end, sizes)
        score(query, onward(keys, at), count, onward(scores, place), group, dim, onward(keys, later))
    rows = carray(scores, (group, PIECE))
    for g in range(group):
        own_scores = rows[g, : end - begin]
        if softcap > 0:
            cap(own_scores, softcap)
        partial[g, dim] = largest(own_scores)
        partial[g, dim + 1] = weigh(own_scores, partial[g, dim])
    totals = carray(sums, (group, dim))
    totals[:] = f32(0)
    for page in pages:
        at, later, count, place = span(page, table, begin, end, sizes)
        add(onward(scores, place), onward(values, at), count, sums, group, dim, onward(values, later))
    partial[:, :dim] = totals


@njit(fastmath=FAST)
def join(partial, sinks, out, group, dim):
    """A row's pieces `[pieces, group, dim + 2]` of one KV head to its result; `sinks[group]` is empty without sinks."""
    for g in range(group):
        most = largest(partial[:, g, dim])
        if len(sinks):
            most = max(most, sinks[g])
        total = exp(sinks[g] - most) if len(sinks) else f32(0)
        own = out[g * dim : (g + 1) * dim]
        own[:] = f32(0)
        for piece in partial:
            factor = exp(piece[g, dim] - most)
            total += factor * piece[g, dim + 1]
            for d in range(dim):
                own[d] += factor * piece[g, d]
        for d in range(dim):
            own[d] /= total


@njit(fastmath=FAST)
def decode(call, keys):
    """What one thread does: its share of the positions, and when all are done, of the rows."""
    rows, kv_heads, group, dim = call.rows, call.kv_heads, call.group, call.head_dim
    query, scratch = floats_at(call.query), floats_at(call.scratch)
    out = carray(floats_at(call.out), (rows, kv_heads, group * dim))
    values = onward(keys, call.block_size * dim)
    pieces = carray(integers_at(call.pieces), (call.count, 3))
    first = carray(integers_at(call.first), (rows + 1,))
    tables = carray(integers_at(call.tables), (rows, call.width))
    partial = carray(floats_at(call.partial), (call.count, kv_heads, group, dim + 2))
    sinks = carray(floats_at(call.sinks), (kv_heads, group if call.sinks else 0))
    team, mine = threads(), thread()
    own_scratch = onward(scratch, mine * group * (PIECE + dim))

    positions = 0
    for i in range(call.count):
        positions += (pieces[i, 2] - pieces[i, 1]) * kv_heads
    begin, end, at = positions * mine // team, positions * (mine + 1) // team, 0
    for i in range(call.count):
        row, left, right = pieces[i, 0], pieces[i, 1], pieces[i, 2]
        for h in range(kv_heads):
            if begin <= at < end:
                sizes = (group, dim, call.block_size, call.block_stride, h * call.head_stride)
                asked, own = onward(query, (row * kv_heads + h) * group * dim), partial[i, h]
                attend(asked, keys, values, tables[row], left, right, sizes, call.softcap, own_scratch, own)
            at += right - left
    barrier()
    heads = rows * kv_heads
    for item in range(heads * mine // team, heads * (mine + 1) // team):
        row, h = item // kv_heads, item % kv_heads
        join(partial[first[row] : first[row + 1], h], sinks[h], out[row, h], group, dim)


def decode_fp32(address):
    call = carray(call_at(address), (1,))[0]
    decode(call, floats_at(call.keys))


def decode_bf16(address):
    call = carray(call_at(address), (1,))[0]
    decode(call, bfloats_at(call.keys))


def decode_fp16(address):
    call = carray(call_at(address), (1,))[0]
    decode(call, halves_at(call.keys))


ENTRIES: dict[torch.dtype, Callable[[int], None]] = {
    torch.float32: decode_fp32,
    torch.bfloat16: decode_bf16,
    **({torch.float16: decode_fp16} if reads_halves() else {}),
}
