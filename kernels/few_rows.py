"""A linear layer for few rows, compiled: the weight is read where it lies, once, at the speed of memory; in fp32, bf16
or fp16, and all arithmetic is fp32.

Two rows of the weight at a time are multiplied with up to eight of the input, while the next two are fetched.
"""

from collections.abc import Callable
from ctypes import Structure, c_int64
from functools import cache

import torch
from numba import carray, njit

from kvferry.kernels.native import (
    FAST,
    Kernel,
    bfloats_at,
    floats_at,
    halves_at,
    reads_halves,
    record_at,
    thread,
    threads,
)
from kvferry.kernels.vectors import onward, products

MOST_ROWS = 24  # for more, arithmetic counts
TOGETHER = 2  # rows of the weight


class Call(Structure):
    """What the kernel is given; names of arrays are their addresses, contiguous."""

    _fields_ = (
        ("rows", c_int64),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("weight", c_int64),  # [outputs, inputs]
        ("x", c_int64),  # fp32 [rows, inputs]
        ("out", c_int64),  # fp32 [rows, outputs]
    )


call_at = record_at(Call)


class FewRows:
    """`x[rows, inputs]` times `weight[outputs, inputs]` transposed, fp32 `[rows, outputs]`. The weight has one of the
    dtypes of `ENTRIES`, is contiguous, and stays where it is. Not for two threads at once."""

    def __init__(self, weight: torch.Tensor):
        outputs, inputs = weight.shape
        self._weight, self._kernel = weight, linear_kernel(weight.dtype)
        self._call = Call(inputs=inputs, outputs=outputs, weight=weight.data_ptr())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows, call = len(x), self._call
        x, out = x.to(torch.float32).contiguous(), x.new_empty((rows, call.outputs), dtype=torch.float32)
        call.rows, call.x, call.out = rows, x.data_ptr(), out.data_ptr()
        self._kernel.run(call)
        return out


@cache
def linear_kernel(dtype: torch.dtype) -> Kernel:
    """The kernel for weights of this dtype, one of `ENTRIES`; it takes a `Call`."""
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
