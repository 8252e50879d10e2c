"""The copies themselves: between a worker's memory and the arena, checksummed while the bytes are in cache, or sealed
and opened on the way.

These functions run in a thread. They give up the interpreter lock for every segment, so the event loop goes on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvferry.common.block import MAX_SEGMENTS, PROOF_BYTES, segment_checksums
from kvferry.common.hashing import BlockName
from kvferry.common.store_api import Located, Payload
from kvferry.kvstore.arena import ArenaMap
from kvferry.kvstore.seal import Seal

CHUNK_BYTES = 64 * 2**20  # copied in one go, and committed in one; a cancelled copy ends within this
MAX_CHUNK_BLOCKS = 256
PIECE_BYTES = 256 * 2**10  # copied at a time: its checksums find it in the core's own cache


def never() -> bool:
    return False


def blocks_per_chunk(block_bytes: int) -> int:
    return max(1, min(MAX_CHUNK_BLOCKS, CHUNK_BYTES // block_bytes))


@dataclass(frozen=True, slots=True)
class Pulled:
    """`good` leading blocks verified in `seconds`."""

    good: int
    seconds: float


def copy_in(
    arena: ArenaMap,
    slots: Sequence[int],
    payloads: Sequence[Payload],
    segments: int,
    seal: bytes | None,
    lost: Callable[[], bool] = never,
) -> list[Located]:
    """Write each payload (`block_bytes` bytes) to its slot, sealed if there is a key. How to verify each.

    `lost` is asked before each block: once it says that the slots may be somebody else's soon, nothing more is written,
    and the answer is shorter. Checksums are those of the payload, so what another one writes to a slot is found out.
    """
    sealing = Seal(seal) if seal else None
    written = []
    for slot, block in zip(slots, payloads, strict=True):
        if lost():
            break
        source, target = np.frombuffer(block.data, dtype=np.uint8), arena.array(slot)
        if sealing is None:
            salt, proofs = b"", copy_and_sum(source, target, segments, source)
        else:
            salt, proofs = sealing.seal(block.name, block.parent, source.data, target.data, segments)
        written.append(Located(slot, salt, proofs))
    return written


def copy_out(
    arena: ArenaMap,
    blocks: Sequence[Located],
    chain: Sequence[BlockName],
    into: Sequence[memoryview],
    seal: bytes | None,
    lost: Callable[[], bool] = never,
) -> Pulled:
    """Read each slot to its destination (`block_bytes` writable bytes) and verify it there; stop at a bad one, or when
    `lost`, asked before each, says that the slots are not to be read any more.

    `chain[i]` and `chain[i + 1]` are the names of block i's parent and of block i. With a key only sealed blocks are
    good, without one only plain ones: who seals trusts nothing else.
    """
    start = time.perf_counter()
    sealing = Seal(seal) if seal else None
    for good, (block, destination) in enumerate(zip(blocks, into, strict=True)):
        if lost():
            return Pulled(good, time.perf_counter() - start)
        source, target = arena.array(block.slot), np.frombuffer(destination, dtype=np.uint8)
        salt, proofs = block.salt, block.proofs
        if bool(salt) != bool(seal) or not prove_every_byte(proofs, len(source)):
            right = False
        elif sealing is None:
            right = copy_and_sum(source, target, len(proofs) // PROOF_BYTES, target) == proofs
        else:
            right = sealing.open(chain[good + 1], chain[good], salt, proofs, source.data, target.data)
        if not right:
            return Pulled(good, time.perf_counter() - start)
    return Pulled(len(blocks), time.perf_counter() - start)


def prove_every_byte(proofs: bytes, size: int) -> bool:
    """Whether this many proofs are one for each of the equal parts of a block of `size` bytes."""
    segments, rest = divmod(len(proofs), PROOF_BYTES)
    return not rest and 1 <= segments <= MAX_SEGMENTS and size % segments == 0


def copy_and_sum(source: np.ndarray, target: np.ndarray, segments: int, summed: np.ndarray) -> bytes:
    """Copy a block's bytes. The checksums of its segments, as `summed`, one of the two, has them after the copy."""
    segment = len(source) // segments
    step = max(1, PIECE_BYTES // segment)  # segments
    checksums = []
    for first in range(0, segments, step):
        part = slice(first * segment, min(first + step, segments) * segment)
        np.copyto(target[part], source[part])
        piece = summed[part]
        checksums.append(segment_checksums(piece.data, len(piece) // segment))
    return b"".join(checksums)
