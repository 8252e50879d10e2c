"""Kernels for the CPU, compiled by numba and run on torch's own threads.

A kernel is a function of one address, of a record of sizes, numbers and further addresses, that every thread of a team
calls alike; it shares the work out by `thread()` and `threads()`. The team is torch's own: of two OpenMP
runtimes in one process each would spin on the cores that the other needs. Compiled code is kept on disk, where there is
a place for it, so that it is made once a machine.
"""

import ctypes
import hashlib
import logging
import platform
import shutil
import tempfile
import threading
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
from numba.core.ccallback import CFunc
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

log = logging.getLogger(__name__)

# Sums are taken in any order, but NaN and infinity stay what they are: a row that is broken must be seen to be.
FAST = {"reassoc", "contract", "nsz", "arcp"}
LINE = 64  # bytes of a cache line
# What kernels are made of, read as it is imported: when they are compiled, another version may lie there.
SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))

# OpenMP functions that compiled code calls by their names, so that the code can be kept.
thread = types.ExternalFunction("omp_get_thread_num", types.int32())
threads = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())  # until all threads of the team are here


@cache
def openmp() -> ctypes.CDLL:
    """The OpenMP that torch uses, whose functions are known to compiled code from here on."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # and what it is linked to
    try:
        for function in (thread, threads, barrier):
            address = ctypes.cast(getattr(library, function.symbol), ctypes.c_void_p).value
            llvmlite.binding.add_symbol(function.symbol, address)
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
    except AttributeError as error:
        raise RuntimeError(f"this torch has no OpenMP that the CPU's kernels could run on: {error}") from error
    return library


class Kernel:
    """A kernel, compiled now or read from where it was kept."""

    def __init__(self, function: Callable[[int], None]):
        self._parallel = openmp().GOMP_parallel
        self._compiled = compiled(function)
        self._address = self._compiled.address

    def run(self, call: ctypes.Structure | ctypes.Array, most_threads: int | None = None) -> None:
        """Call it on as many threads as torch uses here, or fewer, and wait for all of them."""
        self._parallel(self._address, ctypes.addressof(call), most_threads or torch.get_num_threads(), 0)


def compiled(function: Callable[[int], None]) -> CFunc:
    """Compile a kernel, or read what was compiled of it before, here or by another process."""
    signature, folder = types.void(types.intp), None
    with _compiling:
        before = numba.config.CACHE_DIR
        try:
            folder = kept_at(function)
            numba.config.CACHE_DIR = str(folder)
            return cfunc(signature, fastmath=FAST, cache=True)(function)
        except Exception as error:  # whatever is wrong with what was kept, or with its place
            log.info("compiled code is not kept: %s: %s", type(error).__name__, error)
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)  # so that the next process makes it anew
            return cfunc(signature, fastmath=FAST)(function)
        finally:
            numba.config.CACHE_DIR = before


_compiling = threading.Lock()


def kept_at(function: Callable[[int], None]) -> Path:
    """The folder for a kernel's code, under a name made of all the sources that it is made of and of this CPU: numba
    itself only looks at the age of the file that the kernel stands in. Beside the sources, or in the user's cache where
    those cannot be written. Raises OSError."""
    own = Path(function.__code__.co_filename)
    machine = llvmlite.binding.get_host_cpu_name() + llvmlite.binding.get_host_cpu_features().flatten()
    digest = hashlib.blake2b(SOURCES + machine.encode(), digest_size=8).hexdigest()
    places = [own.parent / "__pycache__", Path.home() / ".cache" / "kvferry"]
    if numba.config.CACHE_DIR:
        places = [Path(numba.config.CACHE_DIR)]
    for place in places:
        folder = place / f"{own.stem}-{digest}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error
            continue
        return folder
    raise reason


def record_at(kind: type[ctypes.Structure]) -> Callable[[int], object]:
    """For kernels: an address as a pointer to such a record, whose fields it reads by their names."""
    return pointer_to(numba.from_dtype(np.dtype(kind)))


def pointer_to(element: types.Type) -> Callable[[int], object]:
    """For kernels: an address as a pointer to such elements, which `numba.carray` takes."""
    pointer = types.CPointer(element)

    @intrinsic
    def pointer_at(_: object, address: types.Integer) -> tuple[Signature, Callable]:
        def make(context: BaseContext, builder: ir.IRBuilder, __: Signature, arguments: list[ir.Value]) -> ir.Value:
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), make

    return pointer_at


integers_at, floats_at, words_at = (pointer_to(kind) for kind in (types.int64, types.float32, types.uint16))
# numba has no such numbers; `wide` reads them.
bfloats_at, halves_at = pointer_to(types.int16), words_at


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
    return 16 if has("avx512f") else 8


def has(*features: str) -> bool:
    """Whether this CPU has one of these features, by LLVM's names."""
    known = llvmlite.binding.get_host_cpu_features()
    return any(known.get(feature, False) for feature in features)


def reads_halves() -> bool:
    """Whether fp16 can be made fp32 by an instruction; without one LLVM calls a function that is not there."""
    return has("f16c", "fullfp16") or platform.machine() in ("aarch64", "arm64")
