"""What goes between two stores, as somebody on the network sees and changes it."""

import os

import numpy as np
import pytest
from peer_stories import SEAL, TENANT, behind, clients_of, nothing_held, publish, pulled, run, wires
from peer_wire import Wire
from spans import ROOT, span
from store_host import Host

from kvferry.common.config import StoreConfig
from kvferry.common.store_api import Payload
from kvferry.kvstore import peering
from kvferry.kvstore import protocol as say
from kvferry.kvstore.peering import Sending, Sent

MARK = os.urandom(32)
COUNT = 40


class OnlySealed(StoreConfig):
    """As if it listened beyond loopback."""

    only_sealed = True


@pytest.mark.parametrize("seal", [SEAL, None], ids=["sealed", "plain"])
def test_nothing_of_a_sealed_block_is_on_the_wire(ground, seal):
    """Of a plain one it is: the search finds what is there."""

    async def story():
        async with wires(1) as (wire,):
            one, two = behind(ground, wire), ground.peer(start=False)
            ground.start(one, two)
            wire.seen = bytearray()
            async with clients_of(ground, one, two) as (writer, reader):
                names, plain = ground.names("marked", COUNT), MARK * (ground.block_bytes // len(MARK))
                blocks = [Payload(name, parent, memoryview(plain))
                          for name, parent in zip(names, [ground.root, *names], strict=False)]  # fmt: skip
                reservation = await writer.reserve(span(names), tenant=TENANT)
                assert await writer.publish(reservation, blocks, seal) == COUNT
                match = await reader.lookup(span(names), tenant=TENANT, holder=one.address)
                room = ground.room(COUNT)
                assert await reader.pull(match, room, seal) == COUNT
                assert all(block == plain for block in room)
            return wire.seen

    seen = bytes(run(story()))
    print(f"{len(seen)} bytes passed")
    assert len(seen) > COUNT * ground.block_bytes
    marks = [MARK[start : start + 8] for start in range(len(MARK) - 7)]
    assert any(mark in seen for mark in marks) == (seal is None)
    assert SEAL not in seen
    assert b"the secret of all stores" not in seen
    assert all(name in seen for name in ground.names("marked", COUNT)), "names are seen"


async def met_over(ground, wire: Wire, writer, reader, holder: str, seal) -> None:
    """The connection is there, and nothing was sent by it since."""
    names = ground.names("first", 1)
    assert await publish(ground, writer, names, seal) == 1
    assert await pulled(ground, reader, names, seal, holder=holder) == 1
    wire.sent = 0


@pytest.mark.parametrize("seal", [SEAL, pytest.param(None, marks=pytest.mark.long)], ids=["sealed", "plain"])
def test_a_bit_flipped_on_the_wire_loses_that_block_alone(ground, seal):
    header = len(peering.frame(Sending((Sent(b"s" * 16 if seal else b"", bytes(32)),) * COUNT)))
    block, bad = ground.block_bytes, 10
    where = {"payload": header + bad * block + 777, "last": header + bad * block + block - 1}
    if seal:
        size = (header - 16) // COUNT  # of a block's entry, about
        where["entry"] = header - size * (COUNT - bad) + size // 2

    async def story():
        async with wires(1) as (wire,):
            one, two = behind(ground, wire, slots=200), ground.peer(slots=200, start=False)
            ground.start(one, two)
            async with clients_of(ground, one, two) as (writer, reader):
                for turn, (part, at) in enumerate(where.items(), 1):
                    await met_over(ground, wire, writer, reader, one.address, seal)
                    names = ground.names(part, COUNT)
                    assert await publish(ground, writer, names, seal) == COUNT
                    wire.flips = {at}
                    good = await pulled(ground, reader, names, seal, holder=one.address)
                    wire.flips = set()
                    assert bad - 1 <= good <= bad + 1 if part == "entry" else good == bad, part
                    assert wire.sent == header + COUNT * block, "all of it passed, once"
                    stats = await reader.stats()
                    assert (stats.bad_blocks, stats.quarantined, reader.bad_blocks) == (turn, turn, turn)
                    await again(ground, reader, names, good, seal)
                await nothing_held(ground, writer, reader)
                assert (await writer.stats()).bad_blocks == 0

    run(story())


async def again(ground, client, names, lost: int, seal) -> None:
    """Only the lost one is computed again, and all is there."""
    reservation = await client.reserve(span(names), tenant=TENANT)
    assert [claim.value for claim in reservation.claims].count("granted") == 1
    assert await client.publish(reservation, ground.payloads(names)[lost : lost + 1], seal) == 1
    await client.release(reservation.lease)
    assert await pulled(ground, client, names, seal) == len(names)


def test_whatever_is_flipped_it_is_a_miss_or_right(ground):
    """Anywhere in what is said before the blocks: lengths, kinds, salts, tags."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    count = 4
    header = len(peering.frame(Sending((Sent(b"s" * 16, bytes(32)),) * count)))
    places = [*range(16), *(int(place) for place in random.integers(16, header, 24))]

    async def story():
        async with wires(1) as (wire,):
            one, two = behind(ground, wire, slots=300), ground.peer(slots=300, start=False)
            ground.start(one, two)
            async with clients_of(ground, one, two) as (writer, reader):
                for place in places:
                    names = ground.names(f"at{place}-{len(names_seen)}", count)
                    names_seen.append(names)
                    assert await publish(ground, writer, names, SEAL) == count

                    async def meet():  # it is left alone for a while after a fault
                        await met_over(ground, wire, writer, reader, one.address, SEAL)
                        fresh = ground.names(f"met{len(names_seen)}", 1)
                        names_seen.append(fresh)
                        await publish(ground, writer, fresh, SEAL)
                        return await pulled(ground, reader, fresh, SEAL, holder=one.address) == 1

                    await ground.until(meet)
                    wire.sent, wire.flips = 0, {place}
                    assert await pulled(ground, reader, names, SEAL, holder=one.address, within_s=6) <= count
                    wire.flips = set()
                    assert wire.sent > place
                    await nothing_held(ground, reader)

    names_seen: list[list[bytes]] = []
    run(story())


def test_a_store_beyond_loopback_neither_takes_nor_brings_plain_blocks(ground):
    async def story():
        folder = ground.folder
        one = Host(folder, "one", ground.block_bytes, 32)
        two = Host(folder, "two", ground.block_bytes, 32, OnlySealed)
        for host in (one, two):
            await host.start()
        plain, sealed = ground.names("plain", 8), ground.names("sealed", 8)
        assert await publish(ground, one.client, plain) == 8
        assert await publish(ground, one.client, sealed, SEAL) == 8
        assert two.client.only_sealed
        assert not one.client.only_sealed
        assert await pulled(ground, two.client, plain, holder=one.address) == 0

        async def brought():  # it is left alone for a while after that
            return await pulled(ground, two.client, sealed, SEAL, holder=one.address) == 8

        await ground.until(brought)
        assert (await two.client.stats()).committed == 8
        reservation = await two.client.reserve(span(ground.names("mixed", 2)), tenant=TENANT)
        assert await two.client.publish(reservation, ground.payloads(ground.names("mixed", 2))) == 0
        assert (await two.client.stats()).writing == 0, "it does not even ask for slots"
        link, names = two.client._link, tuple(ground.names("mixed", 2))
        lease = two.client._leases[reservation.lease].numbers[0]
        granted = await link.request(say.Grant(link.next_id(), lease, names), say.Granted, 5)
        blocks = [say.Written(name, parent, slot, b"", bytes(16))
                  for name, parent, slot in zip(names, (ROOT, *names), granted.slots, strict=False)]  # fmt: skip
        reply = await link.request(say.Commit(link.next_id(), lease, tuple(blocks)), say.Committed, 5)
        assert reply.outcomes == (say.CommitOutcome.LATE,) * 2
        await two.client.release(reservation.lease)
        assert two.client.connects == 1
        await nothing_held(ground, one.client, two.client)
        for host in (one, two):
            host.index.check_integrity()
            await host.client.close()
            await host.stop()

    run(story())
