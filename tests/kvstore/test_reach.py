"""What a node finds out about others, with nodes of one process that share a table: who computes, and for how long that
is believed."""

import asyncio
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from peer_stories import TENANT
from spans import span
from store_host import Host

from kvferry.common.clock import MonotonicClock
from kvferry.common.store_api import Claim
from kvferry.kvstore import network
from kvferry.kvstore.directory import LocalTable
from kvferry.kvstore.reach import Reach

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
