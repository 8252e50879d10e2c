"""Attention of rows of one token over paged keys and values, compiled: each is read where it lies, once.

The work is a list of pieces, each some positions of one row's context. A piece has a softmax of its own, and a row's
pieces are put together by their largest scores and their sums ("flash decoding"). Pieces begin at multiples of `PIECE`
positions, so that a row's result depends neither on the other rows nor on the number of threads.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import carray, from_dtype, njit

from kvferry.kernels.native import (
    FAST,
    LINE,
    Kernel,
    barrier,
    bfloats_at,
    float_of_bits,
    floats_at,
    halves_at,
    integers_at,
    pointer_to,
    prefetch,
    thread,
    threads,
    wide,
)

PIECE = 512
f32, i32 = np.float32, np.int32


# What a call is given; names of arrays are their addresses.
CALL = np.dtype(
    [
        ("rows", np.int64),
        ("kv_heads", np.int64),
        ("group", np.int64),
        ("head_dim", np.int64),
        ("block_size", np.int64),
        ("block_stride", np.int64),  # elements from a block to the next
        ("head_stride", np.int64),  # elements from a block's KV head to the next
        ("elements", np.int64),  # from `keys` to the pool's end
        ("keys", np.int64),  # a layer's, in the first block; its values are behind them
        ("query", np.int64),  # fp32 [rows, kv_heads, group, head_dim], scaled
        ("out", np.int64),  # fp32, of the same shape
        ("count", np.int64),
        ("pieces", np.int64),  # int64 [count, 3]: row, first position, position after the last
        ("first", np.int64),  # int64 [rows + 1]: where each row's pieces begin
        ("width", np.int64),
        ("tables", np.int64),  # int64 [rows, width]
        ("partial", np.int64),  # fp32 [count, kv_heads, group, head_dim + 2], to work with
        ("scratch", np.int64),  # fp32 [threads, scratch_floats(group, head_dim)], to work with
        ("sinks", np.int64),  # fp32 [kv_heads, group], or 0
        ("softcap", np.float32),  # or 0
    ],
    align=True,
)
call_at = pointer_to(from_dtype(CALL))


@cache
def decode_kernel(dtype: torch.dtype) -> Kernel:
    """The kernel for a pool of this dtype, one of `ENTRIES`; it takes a `CALL`."""
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


@njit(fastmath=FAST | {"nnan"})
def largest(scores):
    """The largest one. Where there is NaN, any number or NaN: the sum of the weights will tell."""
    most = scores[0]
    for score in scores:
        most = max(most, score)
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


@njit(fastmath=FAST)
def score(query, keys, scores, group, dim, begin, end, later):
    """Scores `[group, end - begin]` of a block's keys from `begin` to `end`. `later`: the block that is read next."""
    for j in range(begin, end):
        key = keys[j * dim : (j + 1) * dim]
        for c in range(0, dim, LINE // keys.itemsize):
            prefetch(later, j * dim + c)
        for g in range(group):
            asked = query[g * dim : (g + 1) * dim]
            total = f32(0)
            for d in range(dim):
                total += asked[d] * wide(key[d])
            scores[g, j - begin] = total


@njit(fastmath=FAST)
def add(weights, values, sums, group, dim, begin, end, later):
    """Add a block's values from `begin` to `end`, times their weights, to `sums[group * dim]`; four at a time."""
    whole = begin + (end - begin) // 4 * 4
    for j in range(begin, whole, 4):
        v0, v1 = values[j * dim : (j + 1) * dim], values[(j + 1) * dim : (j + 2) * dim]
        v2, v3 = values[(j + 2) * dim : (j + 3) * dim], values[(j + 3) * dim : (j + 4) * dim]
        for c in range(0, 4 * dim, LINE // values.itemsize):
            prefetch(later, j * dim + c)
        for g in range(group):
            w0, w1, w2, w3 = (
                weights[g, j - begin],
                weights[g, j - begin + 1],
                weights[g, j - begin + 2],
                weights[g, j - begin + 3],
            )
            own = sums[g * dim : (g + 1) * dim]
            for d in range(dim):
                own[d] += w0 * wide(v0[d]) + w1 * wide(v1[d]) + w2 * wide(v2[d]) + w3 * wide(v3[d])
    for j in range(whole, end):
        value = values[j * dim : (j + 1) * dim]
        for g in range(group):
            weight, own = weights[g, j - begin], sums[g * dim : (g + 1) * dim]
            for d in range(dim):
                own[d] += weight * wide(value[d])


@njit(fastmath=FAST)
def attend(query, keys, values, table, begin, end, sizes, softcap, scratch, partial):
    """One piece of one KV head, to `partial[group, dim + 2]`: sums, the largest score, the weights' sum."""
    group, dim, block_size, block, head = sizes
    scores, sums = scratch[: group * PIECE].reshape(group, PIECE), scratch[group * PIECE :]
    first, last, extent = begin // block_size, (end - 1) // block_size, block_size * dim
    for page in range(first, last + 1):
        at, later = table[page] * block + head, table[min(page + 1, last)] * block + head
        own = max(begin, page * block_size)
        left, right = own - page * block_size, min(end - page * block_size, block_size)
        score(query, keys[at : at + extent], scores[:, own - begin :], group, dim, left, right, keys[later:])
    for g in range(group):
        own_scores = scores[g, : end - begin]
        if softcap > 0:
            cap(own_scores, softcap)
        partial[g, dim] = largest(own_scores)
        partial[g, dim + 1] = weigh(own_scores, partial[g, dim])
    sums[:] = f32(0)
    for page in range(first, last + 1):
        at, later = table[page] * block + head, table[min(page + 1, last)] * block + head
        own = max(begin, page * block_size)
        left, right = own - page * block_size, min(end - page * block_size, block_size)
        add(scores[:, own - begin :], values[at : at + extent], sums, group, dim, left, right, values[later:])
    for g in range(group):
        partial[g, :dim] = sums[g * dim : (g + 1) * dim]


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
    query = carray(floats_at(call.query), (rows, kv_heads, group * dim))
    out = carray(floats_at(call.out), (rows, kv_heads, group * dim))
    values = keys[call.block_size * dim :]
    pieces = carray(integers_at(call.pieces), (call.count, 3))
    first = carray(integers_at(call.first), (rows + 1,))
    tables = carray(integers_at(call.tables), (rows, call.width))
    partial = carray(floats_at(call.partial), (call.count, kv_heads, group, dim + 2))
    sinks = carray(floats_at(call.sinks), (kv_heads, group if call.sinks else 0))
    team, mine = threads(), thread()
    scratch = carray(floats_at(call.scratch), (team, group * (PIECE + dim)))[mine]

    positions = 0
    for i in range(call.count):
        positions += (pieces[i, 2] - pieces[i, 1]) * kv_heads
    begin, end, at = positions * mine // team, positions * (mine + 1) // team, 0
    for i in range(call.count):
        row, left, right = pieces[i, 0], pieces[i, 1], pieces[i, 2]
        for h in range(kv_heads):
            if begin <= at < end:
                sizes = (group, dim, call.block_size, call.block_stride, h * call.head_stride)
                own = partial[i, h]
                attend(query[row, h], keys, values, tables[row], left, right, sizes, call.softcap, scratch, own)
            at += right - left
    barrier()
    heads = rows * kv_heads
    for item in range(heads * mine // team, heads * (mine + 1) // team):
        row, h = item // kv_heads, item % kv_heads
        join(partial[first[row] : first[row + 1], h], sinks[h], out[row, h], group, dim)


def decode_fp32(address):
    call = carray(call_at(address), (1,))[0]
    decode(call, carray(floats_at(call.keys), (call.elements,)))


def decode_bf16(address):
    call = carray(call_at(address), (1,))[0]
    decode(call, carray(bfloats_at(call.keys), (call.elements,)))


def decode_fp16(address):
    call = carray(call_at(address), (1,))[0]
    decode(call, carray(halves_at(call.keys), (call.elements,)))


ENTRIES: dict[torch.dtype, Callable[[int], None]] = {
    torch.float32: decode_fp32,
    torch.bfloat16: decode_bf16,
    torch.float16: decode_fp16,
}
