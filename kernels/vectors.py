"""Inner loops of the CPU's kernels, written as LLVM vector code: what is read once serves many sums, all of them in
registers, while what comes next is fetched. LLVM's own vectoriser does not find this.

`pointer` is one of `native.floats_at` and the like; element types are those that `native.widened` reads.
"""

from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.base import BaseContext
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from kvferry.kernels.native import LINE, fetch, lanes, widened

NUMBER, INDEX = ir.FloatType(), ir.IntType(64)


@intrinsic
def onward(_: object, pointer: types.Type, count: types.Type) -> tuple[Signature, Callable]:
    """For kernels: the pointer, `count` elements further on."""

    def make(__: BaseContext, builder: ir.IRBuilder, ___: Signature, arguments: list[ir.Value]) -> ir.Value:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), make


def products(many: int, few: int) -> Callable[..., None]:
    """For kernels: `(a, b, count, out, stride, later)` multiplies `many` rows of `a` with `few` rows of `b`, `count`
    long and end to end: `out[f * stride + m]` is the product of row m of `a` and row f of `b`. `b` and `out` are fp32.
    `later` is where the next rows of `a` lie."""

    @intrinsic
    def multiply(
        _: object,
        a: types.Type,
        b: types.Type,
        count: types.Type,
        out: types.Type,
        stride: types.Type,
        later: types.Type,
    ) -> tuple[Signature, Callable]:
        def make(context: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: list[ir.Value]) -> ir.Value:
            _write_products(Writer(builder, a.dtype), many, few, *arguments)
            return context.get_dummy_value()

        return types.void(a, b, types.int64, out, types.int64, later), make

    return multiply


def weighted(few: int, chunks: int) -> Callable[..., None]:
    """For kernels: `(values, dim, count, weights, stride, sums, later)` adds to `sums[f * dim + d]`, for `few` f and
    for d below `chunks * lanes()`, `weights[f * stride + i] * values[i * dim + d]` over `count` i. `weights` and `sums`
    are fp32. `later` is where the next values lie."""

    @intrinsic
    def add(
        _: object,
        values: types.Type,
        dim: types.Type,
        count: types.Type,
        weights: types.Type,
        stride: types.Type,
        sums: types.Type,
        later: types.Type,
    ) -> tuple[Signature, Callable]:
        def make(context: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: list[ir.Value]) -> ir.Value:
            _write_weighted(Writer(builder, values.dtype), few, chunks, *arguments)
            return context.get_dummy_value()

        return types.void(values, types.int64, types.int64, weights, types.int64, sums, later), make

    return add


class Writer:
    """Writes vector instructions; `element` is what is streamed."""

    def __init__(self, builder: ir.IRBuilder, element: types.Type):
        self.builder, self.element, self.width = builder, element, lanes()
        self.vector = ir.VectorType(NUMBER, self.width)
        self._fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(self.vector, [self.vector] * 3), f"llvm.fma.v{self.width}f32"
        )

    def at(self, start: ir.Value, *offsets: ir.Value | int) -> ir.Value:
        for offset in offsets:
            start = self.builder.gep(start, [INDEX(offset) if isinstance(offset, int) else offset])
        return start

    def times(self, stride: ir.Value, count: int) -> ir.Value:
        return self.builder.mul(stride, INDEX(count))

    def load(self, place: ir.Value) -> ir.Value:
        """A vector of what lies there, which need not be aligned, as it is."""
        kind = ir.VectorType(place.type.pointee, self.width)
        return self.builder.load(self.builder.bitcast(place, kind.as_pointer()), align=2)

    def read(self, place: ir.Value) -> ir.Value:
        """A vector of streamed elements, in fp32."""
        return widened(self.builder, self.load(place), self.element)

    def store(self, vector: ir.Value, place: ir.Value) -> None:
        self.builder.store(vector, self.builder.bitcast(place, vector.type.as_pointer()), align=4)

    def zero(self) -> ir.Value:
        return cgutils.alloca_once_value(self.builder, self.vector([0.0] * self.width))

    def add_product(self, total: ir.Value, a: ir.Value, b: ir.Value) -> None:
        self.builder.store(self.builder.call(self._fma, [a, b, self.builder.load(total)]), total)

    def splat(self, number: ir.Value) -> ir.Value:
        one = self.builder.insert_element(self.vector(ir.Undefined), number, ir.IntType(32)(0))
        return self.shuffle(one, one, [0] * self.width)

    def shuffle(self, a: ir.Value, b: ir.Value, places: list[int]) -> ir.Value:
        mask = ir.VectorType(ir.IntType(32), len(places))(places)
        return self.builder.shuffle_vector(a, b, mask)

    def totals(self, vectors: list[ir.Value]) -> ir.Value:
        """The sum of each vector's lanes, as one vector with a lane a sum; their number is a power of two. Halves are
        added to halves, of two vectors at once for as long as there are two."""
        if len(vectors) > self.width:
            middle = len(vectors) // 2
            return self.shuffle(self.totals(vectors[:middle]), self.totals(vectors[middle:]), list(range(len(vectors))))
        groups, lanes_each = 1, self.width  # a vector holds so many sums, in so many lanes each
        while lanes_each > 1:
            half = lanes_each // 2
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [(vectors[0], None)]
            of = 1 if pairs[0][1] is None else 2
            firsts = [g * lanes_each + i for g in range(groups * of) for i in range(half)]
            vectors = [
                self.builder.fadd(
                    self.shuffle(a, a if b is None else b, firsts),
                    self.shuffle(a, a if b is None else b, [place + half for place in firsts]),
                    flags=("reassoc",),
                )
                for a, b in pairs
            ]
            groups, lanes_each = groups * of, half
        return vectors[0]


def _write_products(
    writer: Writer,
    many: int,
    few: int,
    a: ir.Value,
    b: ir.Value,
    count: ir.Value,
    out: ir.Value,
    stride: ir.Value,
    later: ir.Value,
) -> None:
    builder, width = writer.builder, writer.width
    totals = [[writer.zero() for _ in range(many)] for _ in range(few)]
    whole = builder.sub(count, builder.srem(count, INDEX(width)))
    with cgutils.for_range_slice(builder, INDEX(0), whole, INDEX(width), intp=INDEX) as (at, _):
        read = []
        for m in range(many):
            fetch(builder, writer.at(later, writer.times(count, m), at))
            read.append(writer.read(writer.at(a, writer.times(count, m), at)))
        for f in range(few):
            given = writer.load(writer.at(b, writer.times(count, f), at))
            for m in range(many):
                writer.add_product(totals[f][m], read[m], given)
    vectors = [builder.load(total) for row in totals for total in row]
    padding = (1 << (len(vectors) - 1).bit_length()) - len(vectors)
    sums = writer.totals([*vectors, *[writer.vector([0.0] * width)] * padding])
    for f in range(few):
        own = writer.shuffle(sums, sums, list(range(f * many, (f + 1) * many)))
        writer.store(own, writer.at(out, writer.times(stride, f)))
    with cgutils.for_range_slice(builder, whole, count, INDEX(1), intp=INDEX) as (at, _):
        for f in range(few):
            given = builder.load(writer.at(b, writer.times(count, f), at))
            for m in range(many):
                place = writer.at(out, writer.times(stride, f), m)
                element = builder.load(writer.at(a, writer.times(count, m), at))
                product = builder.fmul(widened(builder, element, writer.element), given)
                builder.store(builder.fadd(builder.load(place), product), place)


def _write_weighted(
    writer: Writer,
    few: int,
    chunks: int,
    values: ir.Value,
    dim: ir.Value,
    count: ir.Value,
    weights: ir.Value,
    stride: ir.Value,
    sums: ir.Value,
    later: ir.Value,
) -> None:
    builder, width = writer.builder, writer.width
    places = [[writer.at(sums, writer.times(dim, f), c * width) for c in range(chunks)] for f in range(few)]
    totals = [[cgutils.alloca_once_value(builder, writer.load(place)) for place in row] for row in places]
    lines = range(0, chunks * width, LINE * 8 // writer.element.bitwidth)
    with cgutils.for_range(builder, count, intp=INDEX) as loop:
        at = builder.mul(loop.index, dim)
        for place in lines:
            fetch(builder, writer.at(later, at, place))
        read = [writer.read(writer.at(values, at, c * width)) for c in range(chunks)]
        for f in range(few):
            weight = writer.splat(builder.load(writer.at(weights, writer.times(stride, f), loop.index)))
            for c in range(chunks):
                writer.add_product(totals[f][c], weight, read[c])
    for row, own in zip(places, totals, strict=True):
        for place, total in zip(row, own, strict=True):
            writer.store(builder.load(total), place)
