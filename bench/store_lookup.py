"""bench/store.py: names, look-ups and the index's memory, at a store node with few blocks and at one with a million.

Takes 5 GB of memory: a slot is a page at least.
"""

import asyncio
import os
import random
import time
from statistics import median

import numpy as np
from store_ground import SEGMENTS, TENANT, Meaning, StoreNode, chain, store_node

from kvferry.common.block import PAGE_BYTES, BlockLayout
from kvferry.common.hashing import KEY_BYTES, CacheScope, Span, TenantKeys
from kvferry.common.store_api import Payload
from kvferry.kvstore.client import StoreClient

PREFIX = 512  # blocks
FEW, MANY = 16, 1954  # prefixes
VOCAB = 128_000
FIGURES = {
    "name_us": Meaning("<= 400", "naming 512 blocks of 16 tokens; medians"),
    "lookup_local_us": Meaning("<= 500", "looking 512 blocks up and leasing them"),
    "lookup_local_many_us": Meaning("<= 750", "the same at a node that has a million blocks"),
    "lookup_local_p99_us": Meaning("", "the 99th percentile, with few"),
    "lookup_local_many_p99_us": Meaning("", "with a million"),
    "lookup_many_over_few": Meaning("", "time, in turns"),
    "index_bytes_per_block": Meaning("", "the node's own memory for each of a million blocks, 8 segments each"),
}


def measure(quick: bool) -> dict[str, float]:
    with store_node(PAGE_BYTES, FEW * PREFIX) as few, store_node(PAGE_BYTES, MANY * PREFIX) as many:
        return asyncio.run(measure_nodes(few, many, 1000 if quick else 5000))


async def measure_nodes(few: StoreNode, many: StoreNode, times: int) -> dict[str, float]:
    with_few, with_many = few.client(), many.client()
    await with_few.start()
    await with_many.start()
    some = [await published(with_few) for _ in range(FEW)]
    first = [await published(with_many) for _ in range(FEW)]
    own = many.own_bytes()
    rest = [await published(with_many) for _ in range(MANY - FEW)]
    layout = BlockLayout(kv_heads=SEGMENTS, layers=32, block_size=16, head_dim=128, dtype="bfloat16")
    scope = CacheScope(TenantKeys.of(os.urandom(KEY_BYTES)), os.urandom(32), layout)
    tokens = [random.randrange(VOCAB) for _ in range(PREFIX * layout.block_size)]
    naming, little, much = [], [], []
    for _ in range(times):
        started = time.perf_counter()
        scope.chain(tokens)
        naming.append(time.perf_counter() - started)
        little.append(await lookup_s(with_few, random.choice(some)))
        much.append(await lookup_s(with_many, random.choice(first + rest)))
    figures = {
        "name_us": median(naming) * 1e6,
        "lookup_local_us": median(little) * 1e6,
        "lookup_local_many_us": median(much) * 1e6,
        "lookup_local_p99_us": sorted(little)[times * 99 // 100] * 1e6,
        "lookup_local_many_p99_us": sorted(much)[times * 99 // 100] * 1e6,
        "lookup_many_over_few": median(b / a for a, b in zip(little, much, strict=True)),
        "index_bytes_per_block": (many.own_bytes() - own) / (PREFIX * len(rest)),
    }
    await with_few.close()
    await with_many.close()
    return figures


async def published(client: StoreClient) -> Span:
    """A new prefix that the node has."""
    span, block = chain(PREFIX), memoryview(np.ones(PAGE_BYTES, dtype=np.uint8))
    parents = (span.parent, *span.names)
    payloads = [Payload(name, parent, block) for name, parent in zip(span.names, parents, strict=False)]
    reservation = await client.reserve(span, tenant=TENANT)
    if await client.publish(reservation, payloads) != PREFIX:
        raise SystemExit("the store did not take every block")
    await client.release(reservation.lease)
    return span


async def lookup_s(client: StoreClient, span: Span) -> float:
    started = time.perf_counter()
    match = await client.lookup(span)
    spent = time.perf_counter() - started
    if len(match.blocks) != PREFIX:
        raise SystemExit("a prefix that was published is not there")
    await client.release(match.lease)
    return spent
