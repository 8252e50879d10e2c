"""The copies themselves: between a worker's memory and the arena, checksummed while the bytes are in cache.

These functions run in a thread. numpy gives up the interpreter lock while it copies, so the event loop goes on.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvferry.common.block import Checksum, segment_checksums
from kvferry.common.store_api import Located
from kvferry.kvstore.arena import ArenaMap

CHUNK_BYTES = 32 * 2**20  # copied in one go; a cancelled pull ends within this
MAX_CHUNK_BLOCKS = 256


def blocks_per_chunk(block_bytes: int) -> int:
    return max(1, min(MAX_CHUNK_BLOCKS, CHUNK_BYTES // block_bytes))


@dataclass(frozen=True, slots=True)
class Pulled:
    """`good` leading blocks verified in `seconds`."""

    good: int
    seconds: float


def copy_in(
    arena: ArenaMap, slots: Sequence[int], payloads: Sequence[memoryview], segments: int
) -> list[tuple[Checksum, ...]]:
    """Write each payload (`block_bytes` bytes) to its slot. The checksums of what was written."""
    checksums = []
    for slot, payload in zip(slots, payloads, strict=True):
        target = arena.array(slot)
        np.copyto(target, np.frombuffer(payload, dtype=np.uint8))
        checksums.append(segment_checksums(target.data, segments))
    return checksums


def copy_out(arena: ArenaMap, blocks: Sequence[Located], into: Sequence[memoryview]) -> Pulled:
    """Read each slot to its destination (`block_bytes` writable bytes) and verify it there; stop at a bad one."""
    start = time.perf_counter()
    for good, (block, destination) in enumerate(zip(blocks, into, strict=True)):
        target = np.frombuffer(destination, dtype=np.uint8)
        np.copyto(target, arena.array(block.slot))
        if segment_checksums(target.data, len(block.checksums)) != block.checksums:
            return Pulled(good, time.perf_counter() - start)
    return Pulled(len(blocks), time.perf_counter() - start)
