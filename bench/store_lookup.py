"""bench/store.py: names, look-ups and the index's memory, with few blocks in the store node and with a million."""

import asyncio
import os
import random
import time
from statistics import median

import numpy as np
from store_ground import SEGMENTS, TENANT, Meaning, StoreNode, chain, store_node

from kvferry.common.block import BlockLayout
from kvferry.common.hashing import KEY_BYTES, CacheScope, Span, TenantKeys
from kvferry.common.store_api import Payload
from kvferry.kvstore.client import StoreClient

PREFIX = 512  # blocks
BLOCK_BYTES = 4096  # the least that a slot takes
MANY = 10**6
VOCAB = 128_000
FIGURES = {
    "name_us": Meaning("<= 400", "naming 512 blocks of 16 tokens; medians"),
    "lookup_local_us": Meaning("<= 500", "looking 512 blocks up and leasing them"),
    "lookup_local_p99_us": Meaning("", "the 99th percentile"),
    "lookup_growth": Meaning("<= 1.5", "the same with a million blocks in the node, over with few"),
    "name_growth": Meaning("<= 1.5", "the same for naming"),
    "lookup_local_many_us": Meaning("", "with a million blocks"),
    "lookup_local_many_p99_us": Meaning("", "the 99th percentile"),
    "name_many_us": Meaning("", "with a million blocks"),
    "index_bytes_per_block": Meaning("", "the node's own memory for each of a million blocks"),
}


def measure(quick: bool) -> dict[str, float]:
    with store_node(BLOCK_BYTES, MANY) as node:
        return asyncio.run(measure_node(node, 500 if quick else 3000))


async def measure_node(node: StoreNode, times: int) -> dict[str, float]:
    client = node.client()
    await client.start()
    spans = [chain(PREFIX) for _ in range(MANY // PREFIX)]
    few = spans[: len(spans) // 100]
    for span in few:
        await publish(client, span)
    own = node.own_bytes()
    figures = await measure_now(client, few, times)
    for span in spans[len(few) :]:
        await publish(client, span)
    blocks = PREFIX * (len(spans) - len(few))
    many = await measure_now(client, spans, times)
    await client.close()
    return {
        **figures,
        "lookup_growth": many["lookup_local_us"] / figures["lookup_local_us"],
        "name_growth": many["name_us"] / figures["name_us"],
        "lookup_local_many_us": many["lookup_local_us"],
        "lookup_local_many_p99_us": many["lookup_local_p99_us"],
        "name_many_us": many["name_us"],
        "index_bytes_per_block": (node.own_bytes() - own) / blocks,
    }


async def publish(client: StoreClient, span: Span) -> None:
    block = memoryview(np.ones(BLOCK_BYTES, dtype=np.uint8))
    parents = (span.parent, *span.names)
    payloads = [Payload(name, parent, block) for name, parent in zip(span.names, parents, strict=False)]
    reservation = await client.reserve(span, tenant=TENANT)
    if await client.publish(reservation, payloads) != len(span):
        raise SystemExit("the store did not take every block")
    await client.release(reservation.lease)


async def measure_now(client: StoreClient, spans: list[Span], times: int) -> dict[str, float]:
    """Look-ups of spans that are there, each at random, and names of as many blocks, in turns."""
    layout = BlockLayout(kv_heads=SEGMENTS, layers=32, block_size=16, head_dim=128, dtype="bfloat16")
    scope = CacheScope(TenantKeys.of(os.urandom(KEY_BYTES)), os.urandom(32), layout)
    tokens = [random.randrange(VOCAB) for _ in range(PREFIX * layout.block_size)]
    naming, looking = [], []
    for _ in range(times):
        started = time.perf_counter()
        scope.chain(tokens)
        named = time.perf_counter()
        match = await client.lookup(random.choice(spans))
        looking.append(time.perf_counter() - named)
        naming.append(named - started)
        if len(match.blocks) != PREFIX:
            raise SystemExit("a prefix that was published is not there")
        await client.release(match.lease)
    return {
        "name_us": median(naming) * 1e6,
        "lookup_local_us": median(looking) * 1e6,
        "lookup_local_p99_us": sorted(looking)[times * 99 // 100] * 1e6,
    }
