"""A store that dies while it is used: nobody is told an error, nothing stale is served, nothing leaks."""

import asyncio
import gc
import os
import signal
import threading
from pathlib import Path

from spans import span

from kvferry.common.store_api import MissReason
from kvferry.kvstore import client as client_module
from kvferry.kvstore.copying import copy_out


def run(story):
    return asyncio.run(asyncio.wait_for(story, 90))


def mappings():
    return sum("kvferry-arena" in line for line in Path("/proc/self/maps").read_text().splitlines())


def open_fds():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_the_store_is_killed_while_workers_pull(ground):
    async def story():
        node = ground.node(slots=256)
        client = ground.client(node)
        await client.start()
        names = ground.names("a", 100)
        payloads = ground.payloads(names)
        stopping = asyncio.Event()
        room = [ground.room(100) for _ in range(3)]
        good = [0]

        async def pull_for_ever(into):
            while not stopping.is_set():
                match = await client.lookup(span(names))
                got = await client.pull(match, into)
                if await client.release(match.lease):
                    assert got == len(match.blocks)
                    assert all(into[i] == payloads[i].data for i in range(0, got, 7))
                    good[0] += got
                await asyncio.sleep(0.001)

        assert await ground.publish(client, names) == 100
        fds = open_fds()
        assert mappings() == 1
        pulling = [asyncio.create_task(pull_for_ever(into)) for into in room]
        boots = {(await client.stats()).boot_id}
        for restart in range(1, 4):
            seen = good[0]
            await ground.until(lambda seen=seen: good[0] > seen or pulling[0].done())
            node.kill()
            node.start()
            await ground.until(lambda restart=restart: client.connects == restart + 1)
            assert await ground.publish(client, names) == 100
            boots.add((await client.stats()).boot_id)
        stopping.set()
        await asyncio.gather(*pulling)
        assert len(boots) == 4
        await ground.until(lambda: mappings() == 1)
        assert open_fds() == fds
        stats = await client.stats()
        assert (stats.leases, stats.bad_blocks) == (0, 0)
        await client.close()
        assert mappings() == 0

    before = open_fds()
    run(story())
    assert open_fds() == before


def test_the_store_is_killed_while_a_worker_publishes(ground):
    async def story():
        node = ground.node(slots=256)
        client = ground.client(node)
        await client.start()
        rounds = [ground.names(f"r{i}", 20) for i in range(200)]
        publishing = asyncio.create_task(publish_all(ground, client, rounds))
        for _ in range(3):
            await ground.until(lambda: client.connected)
            node.kill()
            node.start()
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        assert publishing.cancelled() or publishing.exception() is None
        await ground.until(lambda: client.connected)
        assert await ground.publish(client, ground.names("last", 20)) == 20

        async def quiet():
            stats = await client.stats()
            return (stats.writing, stats.reserved, stats.leases) == (0, 0, 0)

        await ground.until(quiet)
        await client.close()

    run(story())


async def publish_all(ground, client, rounds):
    while True:
        for names in rounds:
            await ground.publish(client, names)
            await asyncio.sleep(0)


def test_a_lease_means_nothing_to_the_next_store(ground):
    async def story():
        node = ground.node()
        client = ground.client(node)
        await client.start()
        names = ground.names("a", 4)
        await ground.publish(client, names)
        old = await client.lookup(span(names))
        held = await client.reserve(span(ground.names("b", 4)), tenant="t")
        node.kill()
        node.start()
        await ground.until(lambda: client.connects == 2)
        await ground.publish(client, ground.names("c", 4))
        new = await client.lookup(span(ground.names("c", 4)))
        assert new.boot_id != old.boot_id
        assert await client.pull(old, ground.room(4)) == 0
        assert await client.publish(held, ground.payloads(ground.names("b", 4))) == 0
        assert await client.release(old.lease) is False
        assert await client.release(held.lease) is False
        assert await client.release(new.lease) is True
        await client.close()

    run(story())


def test_a_store_that_hangs_is_a_store_that_is_gone(ground):
    async def story():
        node = ground.node(lease_s=0.5)
        client = ground.client(node)
        await client.start()
        names = ground.names("a", 4)
        await ground.publish(client, names)
        node.process.send_signal(signal.SIGSTOP)
        assert (await client.lookup(span(names))).miss is MissReason.STORE_UNREACHABLE
        node.process.send_signal(signal.SIGCONT)
        await ground.until(lambda: client.connected)
        match = await client.lookup(span(names))
        assert await client.pull(match, ground.room(4)) == 4
        await client.close()

    run(story())


def test_a_cancelled_pull_lets_go_of_its_destination_first(ground, monkeypatch):
    async def story():
        node = ground.node()
        client = ground.client(node)
        await client.start()
        names = ground.names("a", 4)
        assert await ground.publish(client, names) == 4
        begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

        def slow_copy(*arguments):
            begun.set()
            go_on.wait(10)
            pulled = copy_out(*arguments)
            ended.set()
            return pulled

        monkeypatch.setattr(client_module, "copy_out", slow_copy)
        match = await client.lookup(span(names))
        pulling = asyncio.create_task(client.pull(match, ground.room(4)))
        await ground.until(begun.is_set)
        for _ in range(3):
            pulling.cancel()
            await asyncio.wait([pulling], timeout=0.05)
            assert not pulling.done(), "it returned while a thread could still write to the destination"
        node.kill()
        await ground.until(lambda: not client.connected)
        assert mappings() == 1, "the arena was unmapped under a copy"
        go_on.set()
        await asyncio.gather(pulling, return_exceptions=True)
        assert pulling.cancelled()
        assert ended.is_set()
        await ground.until(lambda: mappings() == 0)
        await client.close()

    run(story())
