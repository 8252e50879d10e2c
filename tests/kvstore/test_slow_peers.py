"""Holders that promise more than they send, and stores that take nothing: who else is there does not pay for it."""

import asyncio
import socket
import time

import pytest
from impostor import SECRET, impostor, me
from peer_stories import TENANT, Starved, clients_of, nothing_held, publish, pulled, run, run_unless_starved
from spans import span

from kvferry.common.clock import ManualClock
from kvferry.kvstore import peering
from kvferry.kvstore.fetching import LEAST_BYTES_PER_S
from kvferry.kvstore.landing import STEPS, STEPS_GRANTED
from kvferry.kvstore.peering import Fetch, Sending, Sent
from kvferry.kvstore.peers import FETCHES_MOST, PATIENCE_S, STALL_S, Pace, Peers, connect

BIG = 2 * 2**20  # bytes of a block
STOPPED = 16  # receivers that take nothing, as many as there are threads that send


async def promise(peer: socket.socket) -> Fetch:
    """Meet a store that fetches, and say that all it asks for comes."""
    await peering.answer(peer, me())
    fetch = await peering.hear(peer, Fetch)
    headers = Sending((Sent(b"", bytes(32)),) * len(fetch.names))
    await asyncio.get_running_loop().sock_sendall(peer, peering.frame(headers))
    return fetch


async def trickle(peer: socket.socket) -> None:
    """Never so little that it seems to have stopped."""
    while True:
        await asyncio.get_running_loop().sock_sendall(peer, bytes(200))
        await asyncio.sleep(STALL_S / 5)


@pytest.mark.parametrize("begins", [False, True], ids=["nothing", "the_first_block"])
def test_a_promise_displaces_no_more_than_two_steps(ground, begins):
    """Behind it comes nothing, or one block and nothing more."""
    asked = 160

    async def answer(peer):
        fetch = await promise(peer)
        if begins:
            await asyncio.get_running_loop().sock_sendall(peer, bytes(fetch.block_bytes))
        await peering.exactly(peer, 1)  # until it is given up

    async def story():
        node = ground.peer(slots=200)
        async with clients_of(ground, node) as (client,), impostor(answer) as (address, met):
            slots = (await client.stats()).slots
            assert await publish(ground, client, ground.names("kept", slots), tenant="other") == slots
            match = await client.lookup(span(ground.names("a", asked)), tenant=TENANT, holder=address)
            await client.release(match.lease)
            await nothing_held(ground, client)
            stats = await client.stats()
            assert (len(met), stats.brought) == (1, 0)
            assert stats.evicted == (STEPS_GRANTED * (asked // STEPS) if begins else 0)
            assert stats.committed == slots - stats.evicted

    run(story())


def test_time_is_bought_by_what_comes():
    least = 100.0
    slow, steady, first_fast = Pace(lambda: least), Pace(lambda: least), Pace(lambda: least)
    for _ in range(1000):
        steady.came(50, 0.5)
        assert not steady.is_over()
    slow.came(1, PATIENCE_S)
    assert not slow.is_over()
    slow.came(1, 0.1)
    assert slow.is_over(), "whatever is to come still"
    first_fast.came(10**9, 0.1)
    first_fast.came(1, PATIENCE_S + 0.1)
    assert first_fast.is_over(), "what was quick once buys no more than the patience"
    shared = Pace(lambda: least / 4)
    for _ in range(1000):
        shared.came(50, 2.0)
        assert not shared.is_over(), "one of four has a quarter to bring"


def test_a_trickle_is_given_up_however_much_was_promised(ground):
    names = ground.names("a", 512)
    whole_s = len(names) * BIG / LEAST_BYTES_PER_S

    async def answer(peer):
        await promise(peer)
        await trickle(peer)

    async def story():
        node = ground.peer(slots=1024)
        async with clients_of(ground, node, block_bytes=BIG) as (client,), impostor(answer) as (address, _):
            match = await client.lookup(span(names), tenant=TENANT, holder=address)
            assert match.coming == len(names)

            async def given_up() -> bool:
                stats = await client.stats()
                return not (stats.reserved or stats.writing)

            await ground.until(given_up, whole_s / 2)
            assert (await client.stats()).brought == 0

    run(story())


def test_trickling_holders_leave_threads_for_others(ground):
    """Sixteen fetches trickle, and another holder's does not wait for their end."""

    async def story():
        fetching = 0
        all_are = asyncio.Event()

        async def answer(peer):
            nonlocal fetching
            await promise(peer)
            fetching += 1
            if fetching == 16:
                all_are.set()
            await trickle(peer)

        one, two = ground.peer(slots=100, start=False), ground.peer(slots=5400, start=False)
        ground.start(one, two)
        async with clients_of(ground, one, two) as (writer, reader), impostor(answer) as (address, _):
            names = ground.names("a", 64)
            assert await publish(ground, writer, names) == 64
            lost = [
                asyncio.create_task(reader.lookup(span(ground.names(f"lost{i}", 640)), tenant=TENANT, holder=address))
                for i in range(8)  # by two connections each
            ]
            await all_are.wait()
            begun = time.monotonic()
            assert await pulled(ground, reader, names, holder=one.address) == 64
            if (took := time.monotonic() - begun) > PATIENCE_S * 0.75:
                raise Starved(f"it took {took:.2f} s, as if it had waited until the others were given up")
            await asyncio.gather(*lost)
            await nothing_held(ground, writer, reader)

    run_unless_starved(story)


def test_a_store_that_takes_nothing_holds_up_nobody(ground):
    """It asks by as many connections as there are threads that send, and has stopped."""

    async def story():
        one, two = ground.peers(2, slots=600)
        async with clients_of(ground, one, two) as (writer, reader):
            names = ground.names("a", 512)
            for start in range(0, 512, 256):
                assert await publish(ground, writer, names[: start + 256]) == start + 256
            stopped = [await connect(one.address) for _ in range(STOPPED)]
            for peer in stopped:
                await peering.call(peer, me("127.0.0.1:2", secret=SECRET), "fetch")
                fetch = peering.frame(Fetch(tuple(names), ground.block_bytes))
                await asyncio.get_running_loop().sock_sendall(peer, fetch)
                assert len((await peering.hear(peer, Sending)).blocks) == 512
            assert await pulled(ground, reader, names[:64], holder=one.address) == 64
            for peer in stopped:
                peer.close()
            await nothing_held(ground, writer, reader)

    run(story())


def test_a_busy_holder_has_time_for_its_first_byte(ground):
    """Its headers are here at once; what follows waits for others, longer than a stop in the middle may last."""
    count = 9

    async def answer(peer):
        fetch = await promise(peer)
        await asyncio.sleep(2 * STALL_S)
        await asyncio.get_running_loop().sock_sendall(peer, bytes(count * fetch.block_bytes))

    async def story():
        node = ground.peer()
        async with clients_of(ground, node) as (client,), impostor(answer) as (address, _):
            match = await client.lookup(span(ground.names("a", count)), tenant=TENANT, holder=address)
            assert len(match) == count
            await client.release(match.lease)
            await nothing_held(ground, client)
            assert (await client.stats()).brought == count

    run(story())


def test_one_store_is_asked_for_so_much_at_once():
    """Who comes later waits for a turn, and holds up no other store's."""

    async def story():
        peers = Peers(me(), ManualClock())
        turns = [peers.turn("127.0.0.1:2") for _ in range(FETCHES_MOST)]
        for turn in turns:
            await turn.__aenter__()
        late = peers.turn("127.0.0.1:2")
        waiting = asyncio.create_task(late.__aenter__())
        async with peers.turn("127.0.0.1:3"):
            assert not waiting.done()
        await turns.pop().__aexit__(None, None, None)
        await waiting
        for turn in (late, *turns):
            await turn.__aexit__(None, None, None)

    run(story())
