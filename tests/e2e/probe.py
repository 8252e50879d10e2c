"""A hand in the store, from outside: where a block lies, a byte of it flipped, a block gone."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from e2e.cluster import Cluster
from spans import span

from kvferry.common.block import BlockLayout, slot_stride
from kvferry.common.hashing import KEY_BYTES, BlockName, CacheScope, TenantId
from kvferry.kvstore.client import StoreClient
from kvferry.router.tenants import Tenants

T = TypeVar("T")


class Probe:
    """Works for a cluster with a tenants file, which tells the names."""

    def __init__(self, cluster: Cluster, tenants_file: Path):
        node = cluster.node("decode")
        self._cluster = cluster
        self._tenants = Tenants.load(tenants_file)
        self._fingerprint = bytes.fromhex(node["fingerprint"])
        self._layout = BlockLayout(**node["layout"])

    def names(self, tokens: Sequence[int], tenant: str = "acme", salt: str = "") -> list[BlockName]:
        return self._scope(tenant, salt).chain(tokens)

    def root(self, tenant: str = "acme", salt: str = "") -> BlockName:
        return self._scope(tenant, salt).root()

    def _scope(self, tenant: str, salt: str) -> CacheScope:
        return CacheScope(self._tenants[TenantId(tenant)].keys, self._fingerprint, self._layout, salt)

    def present(self, names: Sequence[BlockName]) -> list[bool]:
        """Which blocks are committed now."""

        async def look(store: StoreClient) -> list[bool]:
            return [bool((await store.lookup(span([name]), lease=False)).blocks) for name in names]

        return self._with_store(look)

    def flip(self, name: BlockName) -> None:
        """Flip one bit of a committed block in the arena, where nobody looks."""

        async def where(store: StoreClient) -> int:
            return (await store.lookup(span([name]), lease=False)).blocks[0].slot

        flip_bit(self._cluster.of_role("store").pid, self._with_store(where) * slot_stride(self._layout.block_bytes))

    def remove(self, name: BlockName) -> None:
        """Have a block taken out of the store, as any client that finds it bad would."""
        self.flip(name)

        async def find_bad(store: StoreClient) -> int:
            match = await store.lookup(span([name]))
            good = await store.pull(match, [memoryview(bytearray(self._layout.block_bytes))], bytes(KEY_BYTES))
            await store.release(match.lease)
            return good

        assert self._with_store(find_bad) == 0
        assert self.present([name]) == [False]

    def _with_store(self, use: Callable[[StoreClient], Awaitable[T]]) -> T:
        async def run() -> T:
            layout = self._layout
            store = StoreClient(self._cluster.folder / "store", layout.block_bytes, layout.segments, "test")
            await store.start()
            try:
                assert store.connected
                return await use(store)
            finally:
                await store.close()

        return asyncio.run(run())


def flip_bit(store_pid: int, offset: int) -> None:
    """In the arena of a store process."""
    with open(arena_of(store_pid), "r+b", buffering=0) as memory:
        memory.seek(offset)
        (byte,) = memory.read(1)
        memory.seek(offset)
        memory.write(bytes([byte ^ 1]))


def arena_of(store_pid: int) -> Path:
    """As a file; a node may have it open twice."""
    fds = Path(f"/proc/{store_pid}/fd")
    return next(fd for fd in fds.iterdir() if os.readlink(fd).startswith("/memfd:kvferry-arena"))
