"""A linear layer for few rows, compiled: the weight is read where it lies, once, at the speed of memory.

Two rows of the weight at a time are multiplied with up to eight of the input: each vector that is read serves as many
sums, all in registers, while the same place of the next two rows is fetched ahead of its use.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, from_dtype
from numba.core import cgutils, types
from numba.core.base import BaseContext
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from kvferry.kernels.native import Kernel, fetch, floats_at, lanes, pointer_to, thread, threads

MOST_ROWS = 16  # for more, arithmetic counts
TOGETHER = 2  # rows of the weight

# What a call is given; names of arrays are their addresses, all fp32 and contiguous.
CALL = np.dtype(
    [
        ("rows", np.int64),
        ("inputs", np.int64),  # a multiple of `lanes()`
        ("outputs", np.int64),
        ("weight", np.int64),  # [outputs, inputs]
        ("x", np.int64),  # [rows, inputs]
        ("out", np.int64),  # [rows, outputs]
    ]
)
call_at = pointer_to(from_dtype(CALL))


def few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x[rows, inputs]` times `weight[outputs, inputs]` transposed, `[rows, outputs]`; both fp32 and contiguous."""
    (rows, inputs), outputs = x.shape, len(weight)
    out = x.new_empty(rows, outputs)
    record = np.array((rows, inputs, outputs, weight.data_ptr(), x.data_ptr(), out.data_ptr()), dtype=CALL)
    _kernel().run(record)
    return out


def can_take(rows: int, inputs: int) -> bool:
    """Whether `few_rows` is for such a product."""
    return rows <= MOST_ROWS and inputs % lanes() == 0


@cache
def _kernel() -> Kernel:
    return Kernel(linear)


def products(weights: int, rows: int) -> Callable[..., None]:
    """For kernels: `(weight, x, inputs, out, outputs)` writes `weights * rows` products of rows of the weight and of
    `x`, from these pointers on, to `out`. All sums are kept in registers, which LLVM's own vectoriser does not find."""

    @intrinsic
    def product(_: object, weight: types.Type, x: types.Type, inputs: types.Type, out: types.Type, outputs: types.Type):
        def make(context: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: list[ir.Value]) -> ir.Value:
            _write_products(builder, weights, rows, *arguments)
            return context.get_dummy_value()

        return types.void(weight, x, types.int64, out, types.int64), make

    return product


def _write_products(
    builder: ir.IRBuilder,
    weights: int,
    rows: int,
    weight: ir.Value,
    x: ir.Value,
    inputs: ir.Value,
    out: ir.Value,
    outputs: ir.Value,
) -> None:
    width, number, index = lanes(), ir.FloatType(), ir.IntType(64)
    vector = ir.VectorType(number, width)

    def function(name: str, result: ir.Type, *given: ir.Type) -> ir.Function:
        kind = ir.FunctionType(result, given)
        return cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{width}f32")

    def row_of(start: ir.Value, row: int, stride: ir.Value) -> ir.Value:
        return builder.gep(start, [builder.mul(stride, index(row))])

    def load(place: ir.Value) -> ir.Value:
        return builder.load(builder.bitcast(place, vector.as_pointer()), align=4)

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
            own.append(load(place))
        for r, start in enumerate(x_rows):
            given = load(builder.gep(start, [at]))
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


def linear(address):
    """What one thread does: its share of the outputs."""
    call = carray(call_at(address), (1,))[0]
    weight, x, out = floats_at(call.weight), floats_at(call.x), floats_at(call.out)
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
