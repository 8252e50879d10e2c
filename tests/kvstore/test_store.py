"""The store end to end: a node process, and clients that publish to it, pull from it and wait for one another."""

import asyncio
import os
import signal
import socket
import stat
import struct
import time

import numpy as np
import pytest
from spans import span

from kvferry.common.errors import ConfigError, IncompatibleNode
from kvferry.common.store_api import Claim, MissReason
from kvferry.kvstore import protocol as say
from kvferry.kvstore.arena import ArenaMap
from kvferry.kvstore.link import greet


def run(story):
    return asyncio.run(asyncio.wait_for(story, 60))


async def started(ground, node, **changes):
    client = ground.client(node, **changes)
    await client.start()
    return client


def test_what_is_published_is_pulled(ground):
    async def story():
        node = ground.node()
        writer, reader = await started(ground, node), await started(ground, node)
        names = ground.names("a", 40)
        payloads = ground.payloads(names)
        reservation = await writer.reserve(span(names), tenant="t")
        assert set(reservation.claims) == {Claim.GRANTED}
        assert await writer.publish(reservation, payloads) == 40
        match = await reader.lookup(span([*names, ground.root]))
        assert (len(match.blocks), match.miss) == (40, MissReason.NEVER_STORED)
        room = ground.room(40)
        assert await reader.pull(match, room) == 40
        assert all(np.array_equal(got, sent.data) for got, sent in zip(room, payloads, strict=True))
        assert reader.pulled_bytes == writer.published_bytes == 40 * ground.block_bytes
        assert reader.pull_bytes_per_s > 0
        assert await reader.release(match.lease) is True
        assert await reader.release(match.lease) is False
        assert await writer.release(reservation.lease) is True
        stats = await reader.stats()
        assert (stats.committed, stats.leases, stats.writing, stats.reserved) == (40, 0, 0, 0)
        assert stats.committed_by_tenant == {"t": 40}
        await writer.close()
        await reader.close()
        assert node.terminate() == 0
        assert not node.socket.exists()

    run(story())


def test_a_second_writer_is_told(ground):
    async def story():
        node = ground.node()
        one, two = await started(ground, node), await started(ground, node)
        names = ground.names("a", 4)
        first = await one.reserve(span(names), tenant="t")
        second = await two.reserve(span(names), tenant="t")
        assert second.claims == (Claim.TAKEN,) * 4
        assert second.lease == 0
        assert await one.publish(first, ground.payloads(names)) == 4
        third = await two.reserve(span(names), tenant="t")
        assert third.claims == (Claim.PRESENT,) * 4
        assert await two.publish(third, ground.payloads(names)) == 4
        assert (await one.stats()).published == 4
        assert two.published_bytes == 0
        await one.close()
        await two.close()

    run(story())


@pytest.mark.parametrize(("by", "shared"), [("commit", False), ("commit", True), ("release", False),
                                           ("release", True), ("disconnect", False)])  # fmt: skip
def test_a_lookup_waits_for_whoever_computes_and_not_longer(ground, by, shared):
    """Also for another stream of its own connection (`shared`)."""

    async def story():
        node = ground.node()
        writer = await started(ground, node)
        reader = writer if shared else await started(ground, node)
        names = ground.names("a", 3)
        reservation = await writer.reserve(span(names), tenant="t")
        begun = time.monotonic()
        waiting = asyncio.create_task(reader.lookup(span(names), wait_s=30))
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        assert not done, "it did not wait"
        if by == "commit":
            await writer.publish(reservation, ground.payloads(names))
        elif by == "release":
            await writer.release(reservation.lease)
        else:
            await writer.close()
        match = await waiting
        assert time.monotonic() - begun < 5
        assert len(match.blocks) == (3 if by == "commit" else 0)
        assert match.miss is (None if by == "commit" else MissReason.NEVER_STORED)
        await writer.close()
        await reader.close()

    run(story())


def test_a_wait_ends_in_time_and_holds_nothing(ground):
    async def story():
        node = ground.node()
        writer, reader = await started(ground, node), await started(ground, node)
        names = ground.names("a", 3)
        assert await ground.publish(writer, names[:1]) == 1
        await writer.reserve(span(names[1:], names[0]), tenant="t")
        before = (await writer.stats()).leases
        begun = time.monotonic()
        waiting = asyncio.create_task(reader.lookup(span(names), wait_s=0.5))
        await asyncio.wait([waiting], timeout=0.1)
        assert (await writer.stats()).leases == before
        match = await waiting
        assert 0.4 < time.monotonic() - begun < 5
        assert (len(match.blocks), match.miss) == (1, MissReason.BEING_WRITTEN)
        await writer.close()
        await reader.close()

    run(story())


def test_a_cancelled_lookup_leaves_no_lease(ground):
    async def story():
        node = ground.node()
        writer, reader = await started(ground, node), await started(ground, node)
        names = ground.names("a", 2)
        reservation = await writer.reserve(span(names), tenant="t")
        waiting = asyncio.create_task(reader.lookup(span(names), wait_s=30))
        await asyncio.wait([waiting], timeout=0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await writer.publish(reservation, ground.payloads(names))
        await writer.release(reservation.lease)

        async def nothing_leased():
            stats = await writer.stats()
            return stats.lookups == 1 and stats.leases == 0

        await ground.until(nothing_leased)
        await writer.close()
        await reader.close()

    run(story())


@pytest.mark.parametrize("verb", ["lookup", "reserve"])
def test_cancelled_at_the_moment_the_reply_comes(verb, ground, monkeypatch):
    """The reader meets the reply after the caller was cancelled and before it has run again."""

    read_frame, asking = say.read_frame, []

    async def cancelling(reader):
        frame = await read_frame(reader)
        for task in asking:
            task.cancel()
        return frame

    async def story():
        node = ground.node()
        client = await started(ground, node)
        names = ground.names("a", 2)
        await ground.publish(client, names)
        ask = client.lookup(span(names)) if verb == "lookup" else client.reserve(span(names), tenant="t")
        asking.append(asyncio.create_task(ask))
        await asyncio.wait(asking)
        assert asking.pop().cancelled()
        assert (await client.stats()).leases == 0
        await client.close()

    monkeypatch.setattr(say, "read_frame", cancelling)
    run(story())


def test_a_cancelled_publish_gives_its_slots_back(ground):
    async def story():
        from kvferry.common.failpoints import Failpoints

        node = ground.node()
        client = await started(ground, node, failpoints=Failpoints(("publish.granted=sleep:30",)))
        names = ground.names("a", 4)
        reservation = await client.reserve(span(names), tenant="t")
        publishing = asyncio.create_task(client.publish(reservation, ground.payloads(names)))

        async def writing(count):
            return (await client.stats()).writing == count

        await ground.until(lambda: writing(4))
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        await ground.until(lambda: writing(0))
        assert (await client.stats()).reserved == 0
        await client.close()

    run(story())


async def map_arena(node, block_bytes):
    """The arena as a misbehaving process on this host sees it; and the connection that brought it."""
    peer = socket.socket(socket.AF_UNIX)
    peer.setblocking(False)
    peer.connect(str(node.socket))
    welcome, fd = await greet(peer, say.Hello(say.VERSION, "test", block_bytes))
    arena = ArenaMap(fd, welcome.slots, welcome.block_bytes, welcome.slot_stride)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 2**40)
    os.close(fd)
    return peer, arena


def test_a_flipped_byte_is_found_quarantined_and_counted(ground):
    async def story():
        node = ground.node()
        client = await started(ground, node)
        names = ground.names("a", 6)
        await ground.publish(client, names)
        peer, arena = await map_arena(node, ground.block_bytes)
        match = await client.lookup(span(names))
        arena.array(match.blocks[3].slot)[12345] ^= 1
        room = ground.room(6)
        assert await client.pull(match, room) == 3
        assert client.bad_blocks == 1
        stats = await client.stats()
        assert (stats.quarantined, stats.bad_blocks, stats.committed) == (1, 1, 5)
        again = await client.lookup(span(names))
        assert (len(again.blocks), again.miss) == (3, MissReason.PAYLOAD_BAD)
        assert await ground.publish(client, names) == 6
        final = await client.lookup(span(names))
        assert await client.pull(final, room) == 6
        assert final.blocks[3].slot != match.blocks[3].slot
        arena.retire()
        peer.close()
        await client.close()

    run(story())


@pytest.mark.parametrize("where", ["publish.granted", "publish.copied"])
def test_a_killed_publisher_leaves_nothing(ground, where):
    async def story():
        node = ground.node()
        worker = ground.worker(node, "a", 5, f"{where}=kill")
        assert worker.line() == "reserved" + " granted" * 5
        client = await started(ground, node)
        names = ground.names("a", 5)
        waiting = asyncio.create_task(client.lookup(span(names), wait_s=30))
        await asyncio.sleep(0)
        worker.go_on()
        match = await waiting
        ended = time.monotonic()
        assert (len(match.blocks), match.miss) == (0, MissReason.NEVER_STORED)
        stats = await client.stats()
        assert (stats.reserved, stats.committed) == (0, 0)
        assert stats.writing == 5, "a slot was given back while its writer might still write"
        assert (await client.reserve(span(names), tenant="t")).claims == (Claim.GRANTED,) * 5

        async def all_back():
            return (await client.stats()).writing == 0

        await ground.until(all_back)
        assert 0.8 < time.monotonic() - ended < 5
        await client.close()

    run(story())


@pytest.mark.parametrize("where", ["publish.granted", "publish.copied"])
def test_a_stopped_publisher_comes_too_late(ground, where):
    async def story():
        node = ground.node(lease_s=0.5)
        worker = ground.worker(node, "a", 5, f"{where}=stop@1")
        assert worker.line() == "reserved" + " granted" * 5
        client = await started(ground, node)
        names = ground.names("a", 5)
        worker.go_on()
        worker.wait_stopped()
        assert (await client.lookup(span(names), wait_s=20)).miss is MissReason.NEVER_STORED  # at the lapse
        stats = await client.stats()
        assert (stats.reserved, stats.writing) == (0, 5)
        worker.signal(signal.SIGCONT)
        assert worker.line() == "published 0"
        assert (await client.lookup(span(names))).blocks == ()
        stats = await client.stats()
        assert (stats.late_commits, stats.writing, stats.committed) == (5, 0, 0)
        worker.go_on()
        assert worker.line() == "released False"
        await client.close()

    run(story())


def test_a_full_arena_drops_and_fails_nobody(ground):
    async def story():
        node = ground.node(slots=16)
        client = await started(ground, node)
        first, second = ground.names("a", 12), ground.names("b", 12)
        assert await ground.publish(client, first, keep=True) == 12
        assert await ground.publish(client, second) == 4
        assert (await client.stats()).publish_dropped == 8
        assert (await client.stats()).reserved == 0
        assert len((await client.lookup(span(first), lease=False)).blocks) == 12
        await client.close()

    run(story())


def test_other_block_sizes_are_refused_with_the_difference(ground):
    async def story():
        node = ground.node()
        client = await started(ground, node)
        with pytest.raises(IncompatibleNode, match="this node's blocks have 65536 bytes, yours 4096"):
            await started(ground, node, block_bytes=4096)
        with pytest.raises(IncompatibleNode, match="does not fit"):
            await started(ground, ground.node(), block_bytes=2**30)
        assert client.connected
        await client.close()

    run(story())


def test_an_observer_may_only_look(ground):
    async def story():
        node = ground.node()
        observer = await started(ground, node, block_bytes=0)
        assert (await observer.stats()).slots == 0  # before any worker came
        worker = await started(ground, node)
        names = ground.names("a", 3)
        await ground.publish(worker, names)
        before = await worker.stats()
        match = await observer.lookup(span(names), lease=False)
        assert (len(match.blocks), match.lease, match.miss) == (3, 0, None)
        assert await observer.stats() == before
        assert (await observer.lookup(span(names))).miss is MissReason.STORE_UNREACHABLE  # broke the rule, was closed
        await ground.until(lambda: observer.connected)
        await observer.close()
        await worker.close()

    run(story())


def test_without_a_store_every_answer_is_no(ground):
    async def story():
        node = ground.node(start=False)
        client = await started(ground, node)
        names = ground.names("a", 2)
        assert (await client.lookup(span(names))).miss is MissReason.STORE_UNREACHABLE
        reservation = await client.reserve(span(names), tenant="t")
        assert reservation.claims == (Claim.REFUSED,) * 2
        assert await client.publish(reservation, ground.payloads(names)) == 0
        assert await client.release(reservation.lease) is False
        assert await client.stats() is None
        node.start()
        await ground.until(lambda: client.connected)
        assert await ground.publish(client, names) == 2
        await client.close()

    run(story())


def test_a_caller_that_gets_a_size_wrong_hears_it(ground):
    async def story():
        client = ground.client(ground.node(start=False))
        names = ground.names("a", 1)
        reservation = await client.reserve(span(names), tenant="t")
        short = ground.payloads(names)[0]
        short = type(short)(short.name, short.parent, short.data[:100])
        with pytest.raises(ValueError, match="65536 contiguous bytes, not 100"):
            await client.publish(reservation, [short])
        await client.close()

    run(story())


def test_one_node_a_socket(ground):
    node = ground.node()
    assert stat.S_IMODE(os.stat(node.socket).st_mode) == 0o600
    second = type(node)(node.socket, size_bytes=2**20)
    with pytest.raises(RuntimeError, match="ended with 1"):
        second.start()
    assert node.process.poll() is None
    node.kill()
    assert node.socket.exists()
    notes = node.start()  # over what the dead one left
    assert notes[0].stage == "prefault"
    assert any(note.done == note.total > 0 for note in notes)


def test_a_socket_in_use_is_told_in_words(ground):
    async def story():
        from kvferry.common.config import StoreConfig
        from kvferry.common.process import Notifier
        from kvferry.kvstore.node import serve

        node = ground.node()
        with pytest.raises(ConfigError, match="another process answers"):
            await serve(StoreConfig(socket=node.socket), Notifier(None), asyncio.Event())
        missing = StoreConfig(socket=node.socket.parent / "nowhere" / "s", size_bytes=2**20)
        with pytest.raises(ConfigError, match="there is no folder"):
            await serve(missing, Notifier(None), asyncio.Event())

    run(story())


def test_a_node_tells_in_words_who_did_not_greet_and_that_it_ends(ground, capfd):
    """Waits for each line to be there before it goes on."""
    node = ground.node()
    said = ""

    def line(words: str) -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return words in said

    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(node.socket))
        caller.sendall(b"\0\0")
    run(ground.until(lambda: line("before its hello was answered: the connection closed after 2 of 4 bytes")))
    assert node.terminate() == 0
    assert line('"message": "ending"') or line('"message":"ending"'), said


def test_garbage_harms_nobody(ground):
    async def story():
        node = ground.node()
        client = await started(ground, node)
        names = ground.names("a", 3)
        await ground.publish(client, names)
        seed = int.from_bytes(os.urandom(4))
        print(f"seed {seed}")
        random = np.random.default_rng(seed)
        hello = say.encode(say.Hello(say.VERSION, "fuzz", ground.block_bytes))
        lookup = say.encode(say.Lookup(1, tuple(names)))
        pieces = [
            b"\xff\xff\xff\xff",  # a frame of 4 GiB
            struct.pack("<I", say.MAX_FRAME_BYTES + 1),
            say.encode(say.Hello(say.VERSION + 1, "fuzz", ground.block_bytes)),
            hello + b"\xff\xff\xff\xff",
            hello + hello,
            hello + lookup[:-5],
            hello + framed(b"\x84\xa4type\xa6lookup\xa2id\x01\xa5names\xdd\xff\xff\xff\xff"),  # 4 G names, it says
            hello + framed(b"\x93" * 5000),  # deeply nested
            hello + say.encode(say.Abort(1, (0,))),
            hello + say.encode(say.Commit(1, 1, (say.Written(names[0], ground.root, 1, b"", b"c" * 16),))),
            hello + framed(say.encode(say.Lookup(1, tuple(names), float("nan")))[4:]),
            hello + framed(say.encode(say.Lookup(1, (b"short",)))[4:]),
        ]
        for size in random.integers(1, 300, 60):
            noise = random.bytes(int(size))
            cut = bytearray(hello + lookup)
            cut[int(random.integers(len(cut)))] ^= 1 << int(random.integers(8))
            pieces += [noise, hello + noise, hello + framed(noise), bytes(cut)]
        for piece in pieces:
            await asyncio.to_thread(poke, node, piece)
        match = await client.lookup(span(names))
        assert await client.pull(match, ground.room(3)) == 3
        assert client.connects == 1

        async def alone():
            return (await client.stats()).connections == 1

        await ground.until(alone)
        stats = await client.stats()
        assert (stats.writing, stats.reserved, stats.committed) == (0, 0, 3)
        await client.close()
        assert node.terminate() == 0

    run(story())


def framed(body):
    return struct.pack("<I", len(body)) + body


def poke(node, data):
    """Send, close our half, read until the node has closed too."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(20)
        peer.connect(str(node.socket))
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass
        except (ConnectionResetError, BrokenPipeError):
            return
