"""Kernels for the CPU, compiled by numba and run on torch's own threads.

A kernel is a function of one address, of a record of sizes, numbers and further addresses, that every thread of a team
calls alike; it shares the work out by `thread()` and `threads()`. The team is torch's own: of two OpenMP
runtimes in one process each would spin on the cores that the other needs. Compiled code is kept on disk, where there is
a place for it, so that it is made once a machine.
"""

import ctypes
import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

log = logging.getLogger(__name__)


def keep_apart() -> None:
    """Have numba keep what it compiles under a name made of all sources here. Its own check is the age of the file that
    a kernel stands in, but a kernel is made of several. Where that folder cannot be written, numba knows others."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.blake2b(b"".join(path.read_bytes() for path in sources), digest_size=8).hexdigest()
    folder = numba.config.CACHE_DIR or Path(__file__).parent / "__pycache__"
    numba.config.CACHE_DIR = str(Path(folder) / f"kernels-{digest}")


keep_apart()

# Sums are taken in any order, but NaN and infinity stay what they are: a row that is broken must be seen to be.
FAST = {"reassoc", "contract", "nsz", "arcp"}
LINE = 64  # bytes of a cache line

_openmp = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # and what it is linked to
_openmp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_openmp.GOMP_parallel.restype = None


def _by_name(name: str, result: types.Type) -> types.ExternalFunction:
    """An OpenMP function that compiled code calls by its name, so that the code can be kept."""
    llvmlite.binding.add_symbol(name, ctypes.cast(getattr(_openmp, name), ctypes.c_void_p).value)
    return types.ExternalFunction(name, result())


thread = _by_name("omp_get_thread_num", types.int32)
threads = _by_name("omp_get_num_threads", types.int32)
barrier = _by_name("GOMP_barrier", types.void)  # until all threads of the team are here


class Kernel:
    """A kernel, compiled now or read from where it was kept."""

    def __init__(self, function: Callable[[int], None]):
        signature = types.void(types.intp)
        try:
            self._compiled = cfunc(signature, fastmath=FAST, cache=True)(function)
        except RuntimeError as error:
            log.info("compiled code is not kept: %s", error)
            self._compiled = cfunc(signature, fastmath=FAST)(function)
        self._address = self._compiled.address

    def run(self, record: np.ndarray, most_threads: int | None = None) -> None:
        """Call it on as many threads as torch uses here, or fewer, and wait for all of them."""
        _openmp.GOMP_parallel(self._address, record.ctypes.data, most_threads or torch.get_num_threads(), 0)


def pointer_to(element: types.Type) -> Callable[[int], object]:
    """For kernels: an address as a pointer to such elements, which `numba.carray` takes."""
    pointer = types.CPointer(element)

    @intrinsic
    def pointer_at(_: object, address: types.Integer) -> tuple[Signature, Callable]:
        def make(context: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: list[ir.Value]) -> ir.Value:
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), make

    return pointer_at


integers_at, floats_at = pointer_to(types.int64), pointer_to(types.float32)
bfloats_at, halves_at = (
    pointer_to(types.int16),
    pointer_to(types.uint16),
)  # numba has no such numbers: `wide` reads them


@intrinsic
def float_of_bits(_: object, bits: types.Integer) -> tuple[Signature, Callable]:
    """For kernels: the fp32 number that an int32 is when it is read so."""

    def make(__: BaseContext, builder: ir.IRBuilder, ___: Signature, arguments: list[ir.Value]) -> ir.Value:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), make


@intrinsic
def wide(_: object, number: types.Type) -> tuple[Signature, Callable]:
    """For kernels: an element of a `floats_at`, `bfloats_at` or `halves_at` array as fp32."""

    def make(__: BaseContext, builder: ir.IRBuilder, ___: Signature, arguments: list[ir.Value]) -> ir.Value:
        return widened(builder, arguments[0], number)

    return types.float32(number), make


def widened(builder: ir.IRBuilder, value: ir.Value, element: types.Type) -> ir.Value:
    """Write what makes fp32 of an element, or of a vector of them."""

    def like(scalar: ir.Type) -> ir.Type:
        return ir.VectorType(scalar, value.type.count) if isinstance(value.type, ir.VectorType) else scalar

    if element is types.float32:
        return value
    if element is types.uint16:
        return builder.fpext(builder.bitcast(value, like(ir.HalfType())), like(ir.FloatType()))
    bits = like(ir.IntType(32))
    shift = ir.Constant(bits, [16] * bits.count if isinstance(bits, ir.VectorType) else 16)
    return builder.bitcast(builder.shl(builder.zext(value, bits), shift), like(ir.FloatType()))


@intrinsic
def prefetch(_: object, array: types.Array, index: types.Integer) -> tuple[Signature, Callable]:
    """For kernels: have the cache line of `array[index]` fetched, if there is such a place, and go on."""

    def make(context: BaseContext, builder: ir.IRBuilder, taken: Signature, arguments: list[ir.Value]) -> ir.Value:
        data = context.make_array(taken.args[0])(context, builder, arguments[0]).data
        fetch(builder, builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64), make


def fetch(builder: ir.IRBuilder, pointer: ir.Value) -> None:
    """Write the instruction that has a pointer's cache line fetched for reading, into the second level."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, second_level, data = (ir.Constant(number, value) for value in (0, 2, 1))
    builder.call(function, [builder.bitcast(pointer, byte), read, second_level, data])


@cache
def lanes() -> int:
    """How many fp32 numbers one vector register of this machine holds."""
    return 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8
