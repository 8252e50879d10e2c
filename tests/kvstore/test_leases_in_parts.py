"""Leases of blocks that came from another node a few at a time: each part is given back, whatever becomes of the
caller."""

import asyncio

import pytest
from spans import span

COUNT = 250


@pytest.mark.parametrize("turns", range(4))  # of the event loop before it is cancelled
def test_a_release_cancelled_half_way_gives_every_part_back(turns, ground):
    async def story():
        one, two = ground.peer(slots=COUNT), ground.peer(slots=COUNT)
        writer, reader = ground.client(one), ground.client(two)
        for client in (writer, reader):
            await client.start()
        for label in "abcdefgh":  # until one is not there whole before we are told
            names = ground.names(label, COUNT)
            reservation = await writer.reserve(span(names), tenant="t")
            assert await writer.publish(reservation, ground.payloads(names)) == COUNT
            await writer.release(reservation.lease)
            match = await reader.lookup(span(names), tenant="t", holder=one.address)
            if match.coming:
                break
            await reader.release(match.lease)
        assert match.coming
        assert await reader.pull(match, ground.room(COUNT)) == COUNT
        assert (await reader.stats()).leases > 1
        releasing = asyncio.create_task(reader.release(match.lease))
        for _ in range(1 + turns):
            await asyncio.sleep(0)
        releasing.cancel()
        await asyncio.wait([releasing])
        assert (await reader.stats()).leases == 0
        for client in (writer, reader):
            await client.close()

    asyncio.run(asyncio.wait_for(story(), 60))
