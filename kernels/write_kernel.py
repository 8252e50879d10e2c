"""Storing new tokens' keys and values in their slots, compiled: copies of bytes, whatever the dtype."""

from collections.abc import Callable
from ctypes import Structure, c_int64
from functools import cache

import torch
from numba import carray, njit, types

from kvferry.kernels.native import (
    Kernel,
    floats_at,
    integers_at,
    pointer_to,
    record_at,
    thread,
    threads,
    words_at,
)
from kvferry.kernels.vectors import onward

ONE_THREAD = 2**16  # bytes that are copied sooner than a second thread is there


class Call(Structure):
    """What the kernel is given; names of arrays are their addresses, strides count elements."""

    _fields_ = (
        ("tokens", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("keys", c_int64),  # a layer's, in the first block; its values are behind them
        ("slots", c_int64),  # int64 [tokens]: block * block_size + offset
        ("new_key", c_int64),  # [tokens, kv_heads, head_dim], the last dimension contiguous
        ("key_token_stride", c_int64),
        ("key_head_stride", c_int64),
        ("new_value", c_int64),  # of the same shape
        ("value_token_stride", c_int64),
        ("value_head_stride", c_int64),
    )


call_at = record_at(Call)
doubles_at = pointer_to(types.float64)


class SlotWriter:
    """Writes to the slots `slot_mapping[T]` of `pool`, layer by layer."""

    def __init__(self, pool: torch.Tensor, slot_mapping: torch.Tensor):
        _, kv_heads, _, _, block_size, head_dim = pool.shape
        self._pool, self._slots, self._kernel = pool, slot_mapping, write_kernel(pool.element_size())
        self._call = Call(  # addresses of what this object holds
            tokens=len(slot_mapping),
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            block_stride=pool.stride(0),
            head_stride=pool.stride(1),
            slots=slot_mapping.data_ptr(),
        )
        written = 2 * len(slot_mapping) * kv_heads * head_dim * pool.element_size()
        self._most_threads = 1 if written <= ONE_THREAD else None

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `key` and `value`, `[T, kv_heads, head_dim]` each."""
        start = layer * self._pool.stride(2) * self._pool.element_size()
        self._call.keys = self._pool.data_ptr() + start
        key, value = (new.to(self._pool.dtype) for new in (key, value))
        key, value = (new if new.stride(2) == 1 else new.contiguous() for new in (key, value))
        self._call.new_key, self._call.new_value = key.data_ptr(), value.data_ptr()
        self._call.key_token_stride, self._call.key_head_stride, _ = key.stride()
        self._call.value_token_stride, self._call.value_head_stride, _ = value.stride()
        self._kernel.run(self._call, self._most_threads)


@cache
def write_kernel(element_bytes: int) -> Kernel:
    """The kernel for elements of so many bytes; it takes a `Call`."""
    return Kernel(ENTRIES[element_bytes])


@njit
def write(call, keys, new_key, new_value):
    """What one thread does: its share of the tokens."""
    slots, dim = carray(integers_at(call.slots), (call.tokens,)), call.head_dim
    values = onward(keys, call.block_size * dim)
    for token in range(call.tokens * thread() // threads(), call.tokens * (thread() + 1) // threads()):
        block, offset = slots[token] // call.block_size, slots[token] % call.block_size
        for head in range(call.kv_heads):
            at = block * call.block_stride + head * call.head_stride + offset * dim
            key = onward(new_key, token * call.key_token_stride + head * call.key_head_stride)
            value = onward(new_value, token * call.value_token_stride + head * call.value_head_stride)
            carray(onward(keys, at), (dim,))[:] = carray(key, (dim,))
            carray(onward(values, at), (dim,))[:] = carray(value, (dim,))


def write_2_bytes(address):
    call = carray(call_at(address), (1,))[0]
    write(call, words_at(call.keys), words_at(call.new_key), words_at(call.new_value))


def write_4_bytes(address):
    call = carray(call_at(address), (1,))[0]
    write(call, floats_at(call.keys), floats_at(call.new_key), floats_at(call.new_value))


def write_8_bytes(address):
    call = carray(call_at(address), (1,))[0]
    write(call, doubles_at(call.keys), doubles_at(call.new_key), doubles_at(call.new_value))


ENTRIES: dict[int, Callable[[int], None]] = {2: write_2_bytes, 4: write_4_bytes, 8: write_8_bytes}
