"""The copies themselves: between a worker's memory and the arena, checksummed while the bytes are in cache, or sealed
and opened on the way.

These functions run in a thread. numpy gives up the interpreter lock while it copies, so the event loop goes on.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvferry.common.block import PROOF_BYTES, segment_checksums
from kvferry.common.hashing import BlockName
from kvferry.common.store_api import Located, Payload
from kvferry.kvstore.arena import ArenaMap
from kvferry.kvstore.seal import Seal

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
    arena: ArenaMap, slots: Sequence[int], payloads: Sequence[Payload], segments: int, seal: bytes | None
) -> list[Located]:
    """Write each payload (`block_bytes` bytes) to its slot, sealed if there is a key. How to verify each."""
    sealing = Seal(seal) if seal else None
    written = []
    for slot, block in zip(slots, payloads, strict=True):
        target = arena.array(slot)
        if sealing is not None:
            salt, proofs = sealing.seal(block.name, block.parent, block.data, target.data, segments)
        else:
            np.copyto(target, np.frombuffer(block.data, dtype=np.uint8))
            salt, proofs = b"", segment_checksums(target.data, segments)
        written.append(Located(slot, salt, proofs))
    return written


def copy_out(
    arena: ArenaMap,
    blocks: Sequence[Located],
    chain: Sequence[BlockName],
    into: Sequence[memoryview],
    seal: bytes | None,
) -> Pulled:
    """Read each slot to its destination (`block_bytes` writable bytes) and verify it there; stop at a bad one.

    `chain[i]` and `chain[i + 1]` are the names of block i's parent and of block i. With a key only sealed blocks are
    good, without one only plain ones: who seals trusts nothing else.
    """
    start = time.perf_counter()
    sealing = Seal(seal) if seal else None
    for good, (block, destination) in enumerate(zip(blocks, into, strict=True)):
        source, target = arena.array(block.slot), np.frombuffer(destination, dtype=np.uint8)
        if sealing is None:
            np.copyto(target, source)
            right = not block.salt and segment_checksums(target.data, len(block.proofs) // PROOF_BYTES) == block.proofs
        else:
            right = bool(block.salt) and sealing.open(
                chain[good + 1], chain[good], block.salt, block.proofs, source.data, target.data
            )
        if not right:
            return Pulled(good, time.perf_counter() - start)
    return Pulled(len(blocks), time.perf_counter() - start)
