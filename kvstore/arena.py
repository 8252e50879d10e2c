"""The arena: a memfd of fixed-size, page-aligned slots that every process on the host maps.

The node makes it and never touches a byte of it. Its size is sealed, so a mapping can never be cut short (SIGBUS) by
another process.
"""

import asyncio
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from kvferry.common.block import PAGE_BYTES
from kvferry.common.errors import ConfigError, IncompatibleNode

PREFAULT_CHUNK = 64 * 2**20
MADV_POPULATE_WRITE = 23  # madvise(2)
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


async def create_arena(size_bytes: int, progress: Callable[[int, int], None]) -> int:
    """A memfd of `size_bytes` rounded down to pages, every page allocated, sealed against shrinking and growing.

    The caller owns the fd. `progress(done, total)` is told in bytes, in the event loop. Raises ConfigError when the
    memory is not there.
    """
    total = size_bytes // PAGE_BYTES * PAGE_BYTES
    fd = os.memfd_create("kvferry-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        progress(0, total)
        for start in range(0, total, PREFAULT_CHUNK):
            chunk = min(PREFAULT_CHUNK, total - start)
            await asyncio.to_thread(prefault, fd, start, chunk)
            progress(start + chunk, total)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"an arena of {total} bytes cannot be had: {error.strerror}; give the store less") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def prefault(fd: int, start: int, size: int) -> None:
    """Allocate and zero a page-aligned range. Raises OSError when the memory is not there.

    fallocate refuses cleanly, but leaves the zeroing to the first touch, which would be a worker's copy.
    """
    os.posix_fallocate(fd, start, size)
    with mmap.mmap(fd, size, mmap.MAP_SHARED, offset=start) as pages:
        try:
            pages.madvise(MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            for offset in range(0, size, PAGE_BYTES):  # a kernel before 5.14
                pages[offset] = 0


class ArenaMap:
    """A client's mapping of a node's arena, divided into slots.

    `bytes` is the whole of it as `[slots * slot_stride]` uint8. Copies run inside `in_use()`; `retire()` unmaps as
    soon as no copy is running. Both belong to the event loop's thread.
    """

    def __init__(self, fd: int, slots: int, block_bytes: int, slot_stride: int):
        """Maps `fd`, which stays the caller's. Raises IncompatibleNode when it is not the arena it should be."""
        length = slots * slot_stride
        if not 0 < block_bytes <= slot_stride or slots < 1 or os.fstat(fd).st_size < length:
            raise IncompatibleNode(f"an arena of {os.fstat(fd).st_size} bytes does not hold {slots} slots of "
                                   f"{slot_stride} bytes with {block_bytes} in use")  # fmt: skip
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK == 0:
            raise IncompatibleNode("the arena is not sealed against shrinking")
        self.slots = slots
        self.block_bytes = block_bytes
        self.slot_stride = slot_stride
        self.size = length
        self._map = mmap.mmap(fd, length, mmap.MAP_SHARED)
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._users = 0
        self._retired = False

    def slot(self, number: int) -> memoryview:
        """The bytes of one block, writable. Must be dropped before the map can go."""
        return memoryview(self.array(number))

    def array(self, number: int) -> np.ndarray:
        """The same as uint8 `[block_bytes]`."""
        if not 0 <= number < self.slots:
            raise IndexError(f"slot {number} of {self.slots}")
        start = number * self.slot_stride
        return self.bytes[start : start + self.block_bytes]

    def touch(self, start: int, size: int) -> None:
        """Enter a range's pages into this process's page table, so that no copy stops for them later.
        Reads only: others may be writing."""
        self.bytes[start : start + size : PAGE_BYTES].max(initial=0)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._unmap_if_idle()

    def retire(self) -> None:
        """Unmap now, or when the last copy has ended. The map must not be used for new copies."""
        self._retired = True
        self._unmap_if_idle()

    def _unmap_if_idle(self) -> None:
        if self._retired and not self._users and not self._map.closed:
            del self.bytes
            self._map.close()
