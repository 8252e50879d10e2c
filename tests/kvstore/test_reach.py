"""What a node finds out about others, with nodes of one process that share a table: who computes, and for how long that
is believed."""

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from peer_stories import TENANT, known_elsewhere, pulled
from spans import span
from store_host import Host

from kvferry.common.clock import ManualClock, MonotonicClock
from kvferry.common.hashing import SEGMENT
from kvferry.common.store_api import Claim
from kvferry.kvstore import network
from kvferry.kvstore.directory import CLAIM_S, Holder, Key, LocalDirectory, LocalTable
from kvferry.kvstore.reach import AGAIN_S, AT_ONCE, LOCATE_S, Reach, keys_of

BLOCK_BYTES = 64 * 1024
SLOTS = 64


@pytest.fixture
def run():
    """Runs a story of so many hosts: `run(story, count)` with `async def story(*hosts)`."""
    folder = Path(tempfile.mkdtemp(prefix="kvf-"))

    async def whole(story, count):
        table = LocalTable(MonotonicClock())
        hosts = [Host(folder, f"host{i}", BLOCK_BYTES, SLOTS) for i in range(count)]
        with patch.object(network, "LocalTable", lambda clock: table):
            for host in hosts:
                await host.start()
        try:
            async with asyncio.timeout(30):
                await story(*hosts)
            for host in hosts:
                host.index.check_integrity()
        finally:
            for host in hosts:
                await host.client.close()
                await host.stop()

    yield lambda story, count: asyncio.run(whole(story, count))
    shutil.rmtree(folder)


def reach_of(host: Host) -> Reach:
    return host._node._network.reach


class Slow(LocalDirectory):
    """Each answer takes its time."""

    def __init__(self, me: Holder, table: LocalTable, clock: ManualClock, takes_s: float):
        super().__init__(me, table)
        self.asked: list[int] = []
        self._clock, self._takes_s = clock, takes_s

    async def locate(self, keys: Sequence[Key]) -> list[tuple[Holder, ...]]:
        self.asked.append(len(keys))
        self._clock.advance(self._takes_s)
        return await super().locate(keys)


@pytest.mark.parametrize(
    ("there", "takes_s", "found", "asked"),
    [
        (0, 0.0, 0, [SEGMENT]),
        (SEGMENT + AT_ONCE + 10, 0.0, SEGMENT + AT_ONCE + 10, [SEGMENT, AT_ONCE, AT_ONCE]),
        (5000, 0.0, 5000, [SEGMENT, *[AT_ONCE] * 4, 5000 - SEGMENT - 4 * AT_ONCE]),
        (5000, 0.6 * LOCATE_S, SEGMENT + AT_ONCE, [SEGMENT, AT_ONCE]),
        (5000, 2 * LOCATE_S, SEGMENT, [SEGMENT]),
    ],
)
def test_of_a_long_prompt_what_is_found_in_time_counts(ground, run, there, takes_s, found, asked):
    """It is asked for in parts, up to the first block that nobody has."""

    async def story(host):
        clock, table = ManualClock(1e6), LocalTable(MonotonicClock())
        reach, names = reach_of(host), ground.names("a", 5000)
        reach._clock = clock
        reach._directory = slow = Slow(Holder(host.address, bytes(16)), table, clock, takes_s)
        await LocalDirectory(Holder("127.0.0.1:1", bytes(16)), table).announce(keys_of(span(names[:there])))
        assert await reach.seen(span(names)) == found
        assert slow.asked == asked

    run(story, 1)


def test_when_the_owner_has_died_one_of_those_who_wait_computes(ground, run):
    async def story(owner, *others):
        for turn in range(5):
            names = ground.names(f"turn{turn}", 8)
            reservation = await owner.client.reserve(span(names), tenant=TENANT)
            assert set(reservation.claims) == {Claim.GRANTED}
            await owner.client.release(reservation.lease)
            connections = [other.index.connect() for other in others]
            reserved = [
                other.index.reserve(one, span(names), tenant=TENANT)
                for other, one in zip(others, connections, strict=True)
            ]
            found = await asyncio.gather(
                *(reach_of(other).claim(span(names), one.claims) for other, one in zip(others, reserved, strict=True))
            )
            assert sorted(found, key=str) == [0, 0, None], "the others wait where it is computed now"
            for other, one in zip(others, connections, strict=True):
                other.index.disconnect(one)
                other.changed()

    run(story, 4)


def test_who_computed_once_does_not_have_everything_for_ever(ground, run):
    """What begins with a block of which another host had the claim: no more of it is believed to be there than is."""

    async def story(owner, other):
        reach = reach_of(other)
        reach._clock = clock = ManualClock(1e6)
        names, longer = ground.names("a", 8), ground.names("a", 1) + ground.names("b", 39)
        reservation = await owner.client.reserve(span(names), tenant=TENANT)
        assert set((await other.client.reserve(span(names), tenant=TENANT)).claims) == {Claim.TAKEN}
        assert len(await reach._sources(span(longer), "")) == 40, "it may have all of it soon"
        assert (await other.client.lookup(span(longer), lease=False)).coming == 0, "but that is no promise"
        assert await owner.client.publish(reservation, ground.payloads(names)[:1]) == 1
        await owner.client.release(reservation.lease)
        await known_elsewhere(ground, other.client, names[:1])
        assert (await other.client.lookup(span(longer), lease=False)).coming == 1
        clock.advance(CLAIM_S)
        assert await reach._sources(span(longer), "") == [[owner.address]]

    run(story, 2)


def test_an_owner_that_gave_up_is_not_asked_for_blocks(ground, run):
    async def story(owner, other):
        names = ground.names("a", 8)
        reservation = await owner.client.reserve(span(names), tenant=TENANT)
        assert set((await other.client.reserve(span(names), tenant=TENANT)).claims) == {Claim.TAKEN}
        await owner.client.release(reservation.lease)
        await reach_of(other).wait(span(names), asyncio.get_running_loop().time() + 20)
        assert await reach_of(other)._sources(span(names), "") == []

    run(story, 2)


def test_an_owner_that_does_not_wait_is_not_asked_all_the_time(ground, run):
    async def story(owner, other):
        names = ground.names("a", 8)
        await owner.client.reserve(span(names), tenant=TENANT)
        assert set((await other.client.reserve(span(names), tenant=TENANT)).claims) == {Claim.TAKEN}
        asked = 0

        async def answer_at_once(name, deadline):
            nonlocal asked
            asked += 1
            return False

        owner._node._waiters.wait = answer_at_once
        await reach_of(other).wait(span(names), asyncio.get_running_loop().time() + 0.5)
        assert 1 <= asked <= 0.5 / AGAIN_S + 1

    run(story, 2)


def test_a_fill_that_has_begun_is_waited_for(ground, run):
    """Who finds its first blocks claims another block than the one by which it was claimed."""

    async def story(owner, other):
        names = ground.names("a", 8)
        payloads = ground.payloads(names)
        reservation = await owner.client.reserve(span(names), tenant=TENANT)
        for start, end in ((0, 2), (2, 5)):
            assert await owner.client.publish(reservation, payloads[start:end]) == end - start
            while await pulled(ground, other.client, names) < end:
                pass  # the directory is not told before the answer
            late = await other.client.reserve(span(names), tenant=TENANT)
            assert late.claims == (Claim.PRESENT,) * end + (Claim.TAKEN,) * (8 - end)
            await other.client.release(late.lease)
        wait = asyncio.create_task(other.client.lookup(span(names), tenant=TENANT, wait_s=20))
        assert await owner.client.publish(reservation, payloads[5:]) == 3
        match = await wait
        assert len(match) == 8
        await other.client.release(match.lease)
        await owner.client.release(reservation.lease)
        reach_of(owner).tick()
        assert reach_of(owner)._fills == {}

    run(story, 2)
