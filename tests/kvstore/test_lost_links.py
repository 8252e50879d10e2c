"""What a worker does to slots that the node may have given to somebody else: nothing."""

import asyncio
import os
import threading

import msgspec
import numpy as np
import pytest
from peer_stories import run
from spans import span

from kvferry.common.store_api import Located, Payload
from kvferry.kvstore.arena import ArenaMap, create_arena
from kvferry.kvstore.copying import copy_in, copy_out

SIZE, SEGMENTS = 64 * 1024, 2


def make_arena(slots: int) -> ArenaMap:
    fd = asyncio.run(create_arena(slots * SIZE, lambda *_: None))
    try:
        return ArenaMap(fd, slots, SIZE, SIZE)
    finally:
        os.close(fd)


def payload(fill: int) -> Payload:
    return Payload(b"n" * 32, b"p" * 32, memoryview(np.full(SIZE, fill, dtype=np.uint8)))


@pytest.mark.parametrize("seal", [None, b"k" * 32])
def test_a_copy_that_has_waited_for_a_thread_looks_first(seal):
    arena, asked = make_arena(4), iter([False, False, True])
    written = copy_in(arena, [0, 1, 2, 3], [payload(7)] * 4, SEGMENTS, seal, lambda: next(asked))
    assert [one.slot for one in written] == [0, 1]
    assert not arena.array(2).any()
    assert not arena.array(3).any()
    room, asked = [memoryview(np.zeros(SIZE, dtype=np.uint8)) for _ in range(2)], iter([False, True])
    names = [b"p" * 32, b"n" * 32, b"n" * 32]
    assert copy_out(arena, written, names, room, seal, lambda: next(asked)).good == 1
    assert not any(room[1])


def test_what_another_one_writes_to_a_slot_is_found_out(monkeypatch):
    """Between the copy and its checksum too."""
    arena, copy = make_arena(1), np.copyto

    def copy_and_scribble(target, source):
        copy(target, source)
        target[5] ^= 1

    monkeypatch.setattr(np, "copyto", copy_and_scribble)
    (written,) = copy_in(arena, [0], [payload(7)], SEGMENTS, None)
    monkeypatch.undo()
    room = [memoryview(np.zeros(SIZE, dtype=np.uint8))]
    assert copy_out(arena, [Located(0, b"", written.proofs)], [b"p" * 32, b"n" * 32], room, None).good == 0


def test_a_link_that_goes_ends_the_copies_that_wait(ground):
    """Nothing of a publish that waited for a thread is written once its link is gone."""

    async def story():
        node = ground.node(slots=64)
        client, other = ground.client(node), ground.client(node)
        for one in (client, other):
            await one.start()
        names, go_on = ground.names("a", 8), threading.Event()
        reservation = await client.reserve(span(names), tenant="t")
        for _ in range(2):  # as many as it has threads
            client._threads.submit(go_on.wait)
        publishing = asyncio.create_task(client.publish(reservation, ground.payloads(names)))
        await ground.until(lambda: client._threads._work_queue.qsize() > 0)
        client._link.drop("the node did not answer")
        go_on.set()
        assert await publishing == 0
        assert not other._link.arena.bytes.any()
        for one in (client, other):
            await one.close()

    run(story())


def test_plain_blocks_never_touch_an_arena_for_sealed_ones(ground, monkeypatch):
    """Whoever began before the store was there, and knows no better."""

    async def story():
        node = ground.node(slots=64)
        client = ground.client(node)
        assert client.only_sealed, "until the store has said otherwise"
        await client.start()
        assert not client.only_sealed
        names = ground.names("a", 8)
        reservation = await client.reserve(span(names), tenant="t")
        assert await client.publish(reservation, ground.payloads(names), b"k" * 32) == 8
        monkeypatch.setattr(client._link, "welcome", msgspec.structs.replace(client._link.welcome, sealed=True))
        match = await client.lookup(span(names))
        assert await client.pull(match, ground.room(8)) == 0
        more = await client.reserve(span(ground.names("b", 8)), tenant="t")
        before = bytes(client._link.arena.bytes)
        assert await client.publish(more, ground.payloads(ground.names("b", 8))) == 0
        assert bytes(client._link.arena.bytes) == before
        stats = await client.stats()
        assert (stats.committed, stats.quarantined, stats.bad_blocks, client.bad_blocks) == (8, 0, 0, 0)
        assert client.connected
        await client.close()

    run(story())
