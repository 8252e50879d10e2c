"""bench/store.py: blocks into and out of the arena of this host's store node, against the copies alone.

The limit is numpy's copy of each block, in as many threads, into and out of an arena of the same kind and size. Blocks
have fresh names in each round, so that each is written, and takes the place of an older one.
"""

import asyncio
import mmap
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import NamedTuple

import numpy as np
from store_ground import TENANT, Meaning, Seen, StoreNode, chain, loop_late_ms, store_node

from kvferry.common.hashing import KEY_BYTES, Span
from kvferry.common.store_api import Match, Payload
from kvferry.kvstore.arena import ArenaMap, create_arena
from kvferry.kvstore.client import StoreClient

CHAINS = 4  # that an arena holds
THREADS = 2


class Shape(NamedTuple):
    """Blocks of one chain. `suffix` is that of the figures."""

    suffix: str
    blocks: int
    block_bytes: int
    rounds: int
    quick_rounds: int

    @property
    def size(self) -> int:
        return self.blocks * self.block_bytes


SHAPES = (Shape("", 64, 2 * 2**20, 60, 20), Shape("_64k", 256, 64 * 2**10, 400, 120))
FIGURES = {
    "local_pull_over_memcpy": Meaning(">= 0.65", "64 blocks of 2 MiB out of the arena, verified"),
    "local_sealed_pull_over_memcpy": Meaning(">= 0.60", "the same, opened"),
    "publish_over_memcpy": Meaning(">= 0.70", "64 blocks of 2 MiB into it: reserved, granted, checksummed, committed"),
    "sealed_publish_over_memcpy": Meaning("", "the same, sealed"),
    "local_pull_2_threads_over_memcpy": Meaning("", "two pulls of one client at once, against two threads that copy"),
    "local_sealed_pull_2_threads_over_memcpy": Meaning("", "the same, opened"),
    "local_pull_64k_over_memcpy": Meaning(">= 0.45", "256 blocks of 64 KiB, as all that are marked 64k"),
    "local_pull_loop_late_ms": Meaning("", "the event loop's longest delay while 64 blocks of 2 MiB are pulled"),
    "local_sealed_pull_loop_late_ms": Meaning("", "the same, and opened"),
}


def measure(quick: bool) -> dict[str, float]:
    figures: dict[str, float] = {}
    for shape in SHAPES:
        with store_node(shape.block_bytes, CHAINS * shape.blocks) as node:
            figures |= asyncio.run(measure_shape(shape, node, shape.quick_rounds if quick else shape.rounds))
    return figures


async def measure_shape(shape: Shape, node: StoreNode, rounds: int) -> dict[str, float]:
    size, slots = shape.block_bytes, CHAINS * shape.blocks
    fd = await create_arena(slots * size, lambda *_: None)
    arena = ArenaMap(fd, slots, size, size)
    os.close(fd)
    client = node.client()
    await client.start()
    bench = Bench(shape, client, arena, Seen(node.process))
    for _ in range(CHAINS):  # until every slot has been in use
        await bench.round()
    bench.forget()
    for _ in range(rounds):
        await bench.round()
    await client.close()
    return bench.figures()


class Bench:
    """`arena` is the limit's own."""

    def __init__(self, shape: Shape, client: StoreClient, arena: ArenaMap, seen: Seen):
        self._shape, self._client, self._seen = shape, client, seen
        self._slots = [arena.array(slot) for slot in range(arena.slots)]
        self._source = room(shape)
        for block in self._source:
            block[:] = np.frombuffer(os.urandom(shape.block_bytes), dtype=np.uint8)
        self._rooms = [room(shape) for _ in range(THREADS)]
        self._threads = ThreadPoolExecutor(THREADS)
        self._key = os.urandom(KEY_BYTES)
        self._late: dict[str, list[float]] = {}
        self._ours_first = False
        self._published = 0  # the lease of the chain that was published last

    def forget(self) -> None:
        """What was measured until now was a warm-up."""
        self._seen.costs.clear()
        self._late.clear()

    async def round(self) -> None:
        self._ours_first = not self._ours_first
        for kind, key in (("", None), ("sealed_", self._key)):
            await self._in_and_out(kind, key)

    async def _in_and_out(self, kind: str, key: bytes | None) -> None:
        """A chain is published, and pulled once, twice at once, and once more with an eye on the event loop."""
        count = self._shape.blocks
        span = chain(count)
        mine, self._slots = self._slots[:count], self._slots[count:] + self._slots[:count]
        await self._beside(
            (f"{kind}publish", lambda: self._publish(span, key)),
            (f"{kind}copy_in", lambda: self._copies([(self._source, mine)])),
            count,
        )
        match = await self._client.lookup(span)
        for threads, suffix in ((1, ""), (THREADS, f"_{THREADS}_threads")):
            rooms = self._rooms[:threads]
            await self._beside(
                (f"local_{kind}pull{suffix}", lambda rooms=rooms: self._pulls(match, rooms, key)),
                (f"{kind}copy_out{suffix}", lambda rooms=rooms: self._copies([(mine, room) for room in rooms])),
                count * threads,
            )
        late = await loop_late_ms(self._pulls(match, self._rooms[:1], key))
        self._late.setdefault(f"local_{kind}pull_loop_late_ms", []).append(late)
        if not all(np.array_equal(got, sent) for got, sent in zip(self._rooms[0], self._source, strict=True)):
            raise SystemExit("what was pulled is not what was published")
        for lease in (self._published, match.lease):
            await self._client.release(lease)

    async def _beside(
        self,
        ours: tuple[str, Callable[[], Awaitable[int]]],
        limit: tuple[str, Callable[[], Awaitable[int]]],
        expected: int,
    ) -> None:
        """Measure both, one right after the other; who is first changes from round to round."""
        for name, work in (ours, limit) if self._ours_first else (limit, ours):
            await self._seen.during(name, work(), expected)

    async def _publish(self, span: Span, key: bytes | None) -> int:
        parents = (span.parent, *span.names)
        payloads = [Payload(name, parent, block.data)
                    for name, parent, block in zip(span.names, parents, self._source, strict=False)]  # fmt: skip
        reservation = await self._client.reserve(span, tenant=TENANT)
        self._published = reservation.lease
        return await self._client.publish(reservation, payloads, key)

    async def _pulls(self, match: Match, rooms: Sequence[list[np.ndarray]], key: bytes | None) -> int:
        """As many pulls at once as there are rooms."""
        into = [[block.data for block in room] for room in rooms]
        return sum(await asyncio.gather(*[self._client.pull(match, blocks, key) for blocks in into]))

    async def _copies(self, pairs: Sequence[tuple[list[np.ndarray], list[np.ndarray]]]) -> int:
        """The same copies and nothing else, in as many threads as there are pairs."""
        loop = asyncio.get_running_loop()
        return sum(await asyncio.gather(*[loop.run_in_executor(self._threads, copy, *pair) for pair in pairs]))

    def figures(self) -> dict[str, float]:
        shape, seen, figures = self._shape, self._seen, {}
        several = f"_{THREADS}_threads"
        for kind in ("", "sealed_"):
            for ours, limit in (
                (f"local_{kind}pull", f"{kind}copy_out"),
                (f"{kind}publish", f"{kind}copy_in"),
                (f"local_{kind}pull{several}", f"{kind}copy_out{several}"),
            ):
                size = shape.size * (THREADS if ours.endswith(several) else 1)
                figures[f"{ours}{shape.suffix}_over_memcpy"] = seen.speed_over(ours, limit)
                for name, told in ((ours, ours + shape.suffix), (limit, f"{ours}{shape.suffix}_memcpy")):
                    figures[f"{told}_gb_per_s"] = seen.gb_per_s(name, size)
                    figures[f"{told}_cpu_s_per_gb"] = seen.cpu_s_per_gb(name, size)
        if not shape.suffix:
            figures |= {name: median(values) for name, values in self._late.items()}
        return figures


def room(shape: Shape) -> list[np.ndarray]:
    """Memory for the blocks of a shape, each at a page's beginning; every page is there."""
    memory = np.frombuffer(mmap.mmap(-1, shape.size), dtype=np.uint8)
    memory[:] = 1
    return [memory[start : start + shape.block_bytes] for start in range(0, shape.size, shape.block_bytes)]


def copy(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> int:
    for source, target in zip(sources, targets, strict=True):
        np.copyto(target, source)
    return len(sources)
