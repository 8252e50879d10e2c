"""Store nodes that fetch blocks from one another over TCP: what arrives is right, or it is a miss, in time."""

import asyncio

import numpy as np
import pytest
from spans import span

SEAL = bytes(range(32))


def run(story):
    return asyncio.run(asyncio.wait_for(story, 60))


async def started(ground, *nodes, **changes):
    clients = [ground.client(node, **changes) for node in nodes]
    for client in clients:
        await client.start()
    return clients


async def publish(ground, client, names, seal=None, tenant="t"):
    reservation = await client.reserve(span(names), tenant=tenant)
    there = await client.publish(reservation, ground.payloads(names), seal)
    await client.release(reservation.lease)
    return there


async def pulled(ground, client, names, seal=None, **lookup):
    """How many leading blocks could be had, all of them right."""
    match = await client.lookup(span(names), tenant="t", **lookup)
    room = ground.room(len(match))
    good = await client.pull(match, room, seal)
    held = await client.release(match.lease) if match.lease else True
    expect = ground.payloads(names)
    assert all(np.array_equal(got, sent.data) for got, sent in zip(room[:good], expect, strict=False))
    return good if held else 0


@pytest.mark.parametrize("seal", [None, SEAL])
def test_blocks_come_from_where_they_were_computed(ground, seal):
    async def story():
        one, two = ground.peer(slots=200), ground.peer(slots=200)
        writer, reader = await started(ground, one, two)
        assert (writer.address, reader.address) == (one.address, two.address)
        names = ground.names("a", 150)
        assert await publish(ground, writer, names, seal) == 150
        assert await pulled(ground, reader, names, seal) == 0, "nobody has said where they are"
        assert await pulled(ground, reader, names, seal, holder=one.address) == 150
        stats = await reader.stats()
        assert (stats.committed, stats.writing, stats.reserved) == (150, 0, 0)
        one.kill()
        assert await pulled(ground, reader, names, seal) == 150, "they have landed here"
        await writer.close()
        await reader.close()
        assert two.terminate() == 0

    run(story())
