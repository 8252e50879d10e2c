"""A linear layer for few rows, compiled: the weight is read where it lies, once, at the speed of memory; in fp32, bf16
or fp16, and all arithmetic is fp32.

Two rows of the weight at a time are multiplied with up to eight of the input, while the next two are fetched.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import carray, from_dtype, njit

from kvferry.kernels.native import (
    FAST,
    Kernel,
    bfloats_at,
    floats_at,
    halves_at,
    pointer_to,
    reads_halves,
    thread,
    threads,
)
from kvferry.kernels.vectors import onward, products

MOST_ROWS = 24  # for more, arithmetic counts
TOGETHER = 2  # rows of the weight

# What a call is given; names of arrays are their addresses, contiguous.
CALL = np.dtype(
    [
        ("rows", np.int64),
        ("inputs", np.int64),
        ("outputs", np.int64),
        ("weight", np.int64),  # [outputs, inputs]
        ("x", np.int64),  # fp32 [rows, inputs]
        ("out", np.int64),  # fp32 [rows, outputs]
    ]
)
call_at = pointer_to(from_dtype(CALL))


def few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x[rows, inputs]` times `weight[outputs, inputs]` transposed, fp32 `[rows, outputs]`. The weight has one of the
    dtypes of `ENTRIES` and is contiguous."""
    (rows, inputs), outputs = x.shape, len(weight)
    x, out = x.to(torch.float32).contiguous(), x.new_empty((rows, outputs), dtype=torch.float32)
    call = np.array((rows, inputs, outputs, weight.data_ptr(), x.data_ptr(), out.data_ptr()), dtype=CALL)
    linear_kernel(weight.dtype).run(call)
    return out


@cache
def linear_kernel(dtype: torch.dtype) -> Kernel:
    """The kernel for weights of this dtype, one of `ENTRIES`; it takes a `CALL`."""
    return Kernel(ENTRIES[dtype])


two_by_8, two_by_4, two_by_2, two_by_1 = (products(TOGETHER, few) for few in (8, 4, 2, 1))
one_by_1 = products(1, 1)


@njit(fastmath=FAST)
def linear(call, weight):
    """What one thread does: its share of the outputs."""
    x, out = floats_at(call.x), floats_at(call.out)
    rows, inputs, outputs = call.rows, call.inputs, call.outputs
    pairs = outputs // TOGETHER
    for pair in range(pairs * thread() // threads(), pairs * (thread() + 1) // threads()):
        own, to = onward(weight, TOGETHER * pair * inputs), onward(out, TOGETHER * pair)
        later, row = onward(own, TOGETHER * inputs), 0
        while rows - row >= 8:
            two_by_8(own, onward(x, row * inputs), inputs, onward(to, row * outputs), outputs, later)
            row += 8
        if (rows - row) & 4:
            two_by_4(own, onward(x, row * inputs), inputs, onward(to, row * outputs), outputs, later)
            row += 4
        if (rows - row) & 2:
            two_by_2(own, onward(x, row * inputs), inputs, onward(to, row * outputs), outputs, later)
            row += 2
        if (rows - row) & 1:
            two_by_1(own, onward(x, row * inputs), inputs, onward(to, row * outputs), outputs, later)
    if outputs % TOGETHER and thread() == 0:
        own, to = onward(weight, (outputs - 1) * inputs), onward(out, outputs - 1)
        for row in range(rows):
            one_by_1(own, onward(x, row * inputs), inputs, onward(to, row * outputs), outputs, own)


def linear_fp32(address):
    call = carray(call_at(address), (1,))[0]
    linear(call, floats_at(call.weight))


def linear_bf16(address):
    call = carray(call_at(address), (1,))[0]
    linear(call, bfloats_at(call.weight))


def linear_fp16(address):
    call = carray(call_at(address), (1,))[0]
    linear(call, halves_at(call.weight))


ENTRIES: dict[torch.dtype, Callable[[int], None]] = {
    torch.float32: linear_fp32,
    torch.bfloat16: linear_bf16,
    **({torch.float16: linear_fp16} if reads_halves() else {}),
}
