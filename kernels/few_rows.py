"""A linear layer for few rows, compiled: the weight is read where it lies, once, at the speed of memory; in fp32, bf16
or fp16, and all arithmetic is fp32.

Two rows of the weight at a time are multiplied with up to eight of the input: each vector that is read serves as many
sums, all in registers, while the same place of the next two rows is fetched ahead of its use.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, from_dtype, njit
from numba.core import cgutils, types
from numba.core.base import BaseContext
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from kvferry.kernels.native import (
    FAST,
    Kernel,
    bfloats_at,
    fetch,
    floats_at,
    halves_at,
    lanes,
    pointer_to,
    thread,
    threads,
    widened,
)

MOST_ROWS = 24  # for more, arithmetic counts
TOGETHER = 2  # rows of the weight

# What a call is given; names of arrays are their addresses, contiguous.
CALL = np.dtype(
    [
        ("rows", np.int64),
        ("inputs", np.int64),  # a multiple of `lanes()`
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


def can_take(rows: int, inputs: int) -> bool:
    """Whether `few_rows` is for such a product."""
    return rows <= MOST_ROWS and inputs % lanes() == 0


@cache
def linear_kernel(dtype: torch.dtype) -> Kernel:
    """The kernel for weights of this dtype, one of `ENTRIES`; it takes a `CALL`."""
    return Kernel(ENTRIES[dtype])


def products(weights: int, rows: int) -> Callable[..., None]:
    """For kernels: `(weight, x, inputs, out, outputs)` writes `weights * rows` products of rows of the weight and of
    `x`, from these pointers on, to `out`. All sums are kept in registers, which LLVM's own vectoriser does not find."""

    @intrinsic
    def product(_: object, weight: types.Type, x: types.Type, inputs: types.Type, out: types.Type, outputs: types.Type):
        def make(context: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: list[ir.Value]) -> ir.Value:
            _write_products(builder, weight.dtype, weights, rows, *arguments)
            return context.get_dummy_value()

        return types.void(weight, x, types.int64, out, types.int64), make

    return product


def _write_products(
    builder: ir.IRBuilder,
    element: types.Type,
    weights: int,
    rows: int,
    weight: ir.Value,
    x: ir.Value,
    inputs: ir.Value,
    out: ir.Value,
    outputs: ir.Value,
) -> None:
    width, number, index = lanes(), ir.FloatType(), ir.IntType(64)
    vector, read_as = ir.VectorType(number, width), ir.VectorType(weight.type.pointee, width)

    def function(name: str, result: ir.Type, *given: ir.Type) -> ir.Function:
        kind = ir.FunctionType(result, given)
        return cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{width}f32")

    def row_of(start: ir.Value, row: int, stride: ir.Value) -> ir.Value:
        return builder.gep(start, [builder.mul(stride, index(row))])

    def load(place: ir.Value, kind: ir.VectorType) -> ir.Value:
        return builder.load(builder.bitcast(place, kind.as_pointer()), align=2)  # at least

    fma, add_up = (
        function("fma", vector, vector, vector, vector),
        function("vector.reduce.fadd", number, number, vector),
    )
    sums = [[cgutils.alloca_once_value(builder, vector([0.0] * width)) for _ in range(rows)] for _ in range(weights)]
    weight_rows = [row_of(weight, i, inputs) for i in range(weights)]
    x_rows = [row_of(x, i, inputs) for i in range(rows)]
    ahead = builder.mul(inputs, index(TOGETHER))
    with cgutils.for_range_slice(builder, index(0), inputs, index(width), intp=index) as (at, _):
        own = []
        for start in weight_rows:
            place = builder.gep(start, [at])
            fetch(builder, builder.gep(place, [ahead]))
            own.append(widened(builder, load(place, read_as), element))
        for r, start in enumerate(x_rows):
            given = load(builder.gep(start, [at]), vector)
            for i, read in enumerate(own):
                builder.store(builder.call(fma, [read, given, builder.load(sums[i][r])]), sums[i][r])
    for i in range(weights):
        for r in range(rows):
            total = builder.call(add_up, [number(-0.0), builder.load(sums[i][r])], fastmath=("reassoc",))
            builder.store(total, row_of(builder.gep(out, [index(i)]), r, outputs))


@intrinsic
def onward(_: object, pointer: types.Type, count: types.Type):
    """For kernels: the pointer, `count` elements further on."""

    def make(__: BaseContext, builder: ir.IRBuilder, ___: Signature, arguments: list[ir.Value]) -> ir.Value:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), make


two_by_8, two_by_4, two_by_2, two_by_1 = (products(TOGETHER, rows) for rows in (8, 4, 2, 1))
one_by_1 = products(1, 1)


@njit(fastmath=FAST)
def linear(call, weight):
    """What one thread does: its share of the outputs."""
    x, out = floats_at(call.x), floats_at(call.out)
    rows, inputs, outputs = call.rows, call.inputs, call.outputs
    pairs = outputs // 2
    for pair in range(pairs * thread() // threads(), pairs * (thread() + 1) // threads()):
        own, to = onward(weight, 2 * pair * inputs), onward(out, 2 * pair)
        row = 0
        while rows - row >= 8:
            two_by_8(own, onward(x, row * inputs), inputs, onward(to, row * outputs), outputs)
            row += 8
        if (rows - row) & 4:
            two_by_4(own, onward(x, row * inputs), inputs, onward(to, row * outputs), outputs)
            row += 4
        if (rows - row) & 2:
            two_by_2(own, onward(x, row * inputs), inputs, onward(to, row * outputs), outputs)
            row += 2
        if (rows - row) & 1:
            two_by_1(own, onward(x, row * inputs), inputs, onward(to, row * outputs), outputs)
    if outputs % 2 and thread() == 0:
        for row in range(rows):
            last = onward(weight, (outputs - 1) * inputs)
            one_by_1(last, onward(x, row * inputs), inputs, onward(out, row * outputs + outputs - 1), outputs)


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
    torch.float16: linear_fp16,
}
