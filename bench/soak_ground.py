"""bench/soak.py: what its processes agree on. Tenants, chains, and the bytes that follow from a block's name."""

import mmap
import random
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from kvferry.common.hashing import KEY_BYTES, NAME_BYTES, BlockName, Span

BLOCK_BYTES = 384 * 2**10
SEGMENTS = 8
SLOTS = 1024  # of a node's arena: room for a quarter of all chains
TENANTS = 4  # of which every other one's blocks are sealed
CHAINS = 16  # of a tenant
LONGEST = 96  # blocks of a chain: more than a segment of the directory, more than one connection's turn
FAMILY, SHARED = 4, 36  # so many chains begin with the same so many blocks
POOL_BYTES, GRAIN = 64 * 2**20, 64  # a block's bytes are those of the pool from a multiple of the grain on


class Job(msgspec.Struct, frozen=True):
    """What a worker process is told. `nodes`: the addresses of all. `generations`: how often each tenant was erased
    and made again."""

    socket: str
    pool: str
    seed: str
    streams: int
    nodes: tuple[str, ...]
    generations: tuple[int, ...]


class Chain(NamedTuple):
    """`tenant` is a pseudonym. `seal` is None where the tenant's blocks are plain."""

    tenant: str
    seal: bytes | None
    root: BlockName
    names: tuple[BlockName, ...]

    def span(self, first: int, end: int) -> Span:
        return Span.of(self.names, self.root, first, end)


def pseudonym(tenant: int, generation: int) -> str:
    return f"tenant-{tenant}-{generation}"


@lru_cache(2 * TENANTS * CHAINS)
def chain_of(tenant: int, generation: int, number: int) -> Chain:
    who = pseudonym(tenant, generation)
    shared = [named(f"{who}/family-{number // FAMILY}/{i}") for i in range(SHARED)]
    own = [named(f"{who}/{number}/{i}") for i in range(SHARED, LONGEST)]
    seal = blake2b(f"{who}/seal".encode(), digest_size=KEY_BYTES).digest() if tenant % 2 else None
    return Chain(who, seal, named(f"{who}/root"), (*shared, *own))


def named(text: str) -> BlockName:
    return BlockName(blake2b(text.encode(), digest_size=NAME_BYTES).digest())


def make_pool(path: Path, seed: int) -> None:
    path.write_bytes(random.Random(seed).randbytes(POOL_BYTES))


class Pool:
    """Random bytes that all processes share, so that neither publishing nor comparing has to make any."""

    def __init__(self, path: str):
        with open(path, "rb") as file:
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), POOL_BYTES, prot=mmap.PROT_READ), dtype=np.uint8)
        self._bytes[:: mmap.PAGESIZE].max()  # every page is in this process's page table from now on

    def block(self, name: BlockName) -> np.ndarray:
        """What is published under a name. One of a million places: two blocks are hardly ever alike."""
        start = int.from_bytes(name[:8], "little") % ((POOL_BYTES - BLOCK_BYTES) // GRAIN) * GRAIN
        return self._bytes[start : start + BLOCK_BYTES]
