"""A tenant that is erased: its blocks are found no more at once, those in use leave their slots when their leases end,
and nobody else's are touched."""

import asyncio

import numpy as np
import pytest
from peer_stories import (
    behind,
    clients_of,
    in_the_middle,
    nothing_held,
    publish,
    pulled,
    run,
    run_unless_starved,
    wires,
)
from spans import ROOT, span

from kvferry.common.clock import ManualClock
from kvferry.common.store_api import Claim, MissReason
from kvferry.kvstore.eviction import FairLru
from kvferry.kvstore.index import Index
from kvferry.kvstore.protocol import CommitOutcome, Written

SLOTS = 8
COUNT = 20


class Shelf:
    """An index with one connection, that checks itself after every step."""

    def __init__(self, slots=SLOTS):
        self.index = Index(FairLru(), ManualClock(), lease_s=10.0, writing_per_connection=64, boot_id=b"b" * 16)
        self.index.divide(slots, 4096)
        self.me = self.index.connect()

    def publish(self, names, tenant) -> None:
        lease, slots = self.begin(names, tenant)
        assert set(self.commit(lease, names, slots)) == {CommitOutcome.COMMITTED}
        assert self.index.release(self.me, lease)

    def begin(self, names, tenant):
        reservation = self.index.reserve(self.me, span(names), tenant=tenant)
        assert set(reservation.claims) == {Claim.GRANTED}
        _, slots = self.index.grant(self.me, reservation.lease, names)
        self.index.check_integrity()
        return reservation.lease, slots

    def commit(self, lease, names, slots):
        parts = [Written(name, parent, slot, b"", b"c" * 16)
                 for name, parent, slot in zip(names, [ROOT, *names], slots, strict=False)]  # fmt: skip
        outcomes = self.index.commit(self.me, lease, parts)
        self.index.check_integrity()
        return outcomes

    def lease(self, names):
        return self.index.lookup(self.me, names, lease=True)

    def erase(self, tenant) -> int:
        erased = self.index.erase(tenant)
        self.index.check_integrity()
        return erased

    def release(self, lease) -> None:
        assert self.index.release(self.me, lease), "a lease on erased blocks holds to its end"
        self.index.check_integrity()

    @property
    def used(self) -> tuple[int, int]:
        stats = self.index.stats()
        return stats.free, stats.committed


def names_of(label, count):
    return [f"{label}{i}".encode().ljust(32) for i in range(count)]


def test_what_nobody_uses_is_gone_at_once():
    shelf, theirs, others = Shelf(), names_of("t", 3), names_of("o", 2)
    shelf.publish(theirs, "theirs")
    shelf.publish(others, "others")
    assert shelf.erase("theirs") == 3
    assert shelf.erase("theirs") == 0
    assert shelf.erase("nobody") == 0
    assert shelf.used == (SLOTS - 2, 2)
    assert shelf.index.lookup(shelf.me, theirs, lease=False).miss is MissReason.EVICTED
    assert len(shelf.index.lookup(shelf.me, others, lease=False)) == 2
    assert shelf.index.stats().erased == 3


def test_leased_blocks_leave_their_slots_when_their_last_lease_ends():
    shelf, names = Shelf(), names_of("t", 3)
    shelf.publish(names, "theirs")
    two, three = shelf.lease(names[:2]), shelf.lease(names)
    slots = [block.slot for block in three.blocks]
    assert shelf.erase("theirs") == 3
    assert not len(shelf.lease(names)), "nobody finds them"
    assert shelf.used == (SLOTS - 3, 3), "nobody writes where others read"
    _, taken = shelf.begin(names_of("n", SLOTS), "others")
    assert {slot for slot in taken if slot is not None} == set(range(SLOTS)) - set(slots)
    shelf.release(three.lease)
    assert shelf.used == (1, 2)
    shelf.release(two.lease)
    assert shelf.used == (3, 0)


def test_a_name_that_comes_back_is_another_block():
    """Published again while a lease on the erased one lasts."""
    shelf, names = Shelf(), names_of("t", 2)
    shelf.publish(names, "theirs")
    before = shelf.lease(names)
    assert shelf.erase("theirs") == 2
    shelf.publish(names, "theirs")
    after = shelf.lease(names)
    assert not {block.slot for block in before.blocks} & {block.slot for block in after.blocks}
    assert not shelf.index.quarantine(names[0], before.blocks[0].slot), "it is not that name's any more"
    shelf.release(before.lease)
    assert len(shelf.lease(names)) == 2
    assert shelf.erase("theirs") == 2
    shelf.index.disconnect(shelf.me)
    shelf.index.check_integrity()
    assert shelf.used == (SLOTS, 0)


def test_what_is_being_computed_comes_too_late():
    shelf, names, others = Shelf(), names_of("t", 2), names_of("o", 1)
    lease, slots = shelf.begin(names, "theirs")
    kept, kept_slots = shelf.begin(others, "others")
    reserved = shelf.index.reserve(shelf.me, span(names_of("r", 2)), tenant="theirs")
    shelf.index.take_settled()
    assert shelf.erase("theirs") == 0, "nothing of it was there"
    assert set(shelf.index.take_settled()) == {*names, *names_of("r", 2)}, "who waits may look again"
    assert set(shelf.commit(lease, names, slots)) == {CommitOutcome.LATE}
    claims, _ = shelf.index.grant(shelf.me, reserved.lease, names_of("r", 2))
    assert set(claims) == {Claim.REFUSED}
    assert set(shelf.commit(kept, others, kept_slots)) == {CommitOutcome.COMMITTED}
    assert shelf.used == (SLOTS - 1, 1)


def test_erased_blocks_in_use_are_nothing_to_evict():
    shelf, names = Shelf(4), names_of("t", 2)
    shelf.publish(names, "theirs")
    held = shelf.lease(names)
    shelf.erase("theirs")
    shelf.publish(names_of("a", 2), "others")
    shelf.publish(names_of("b", 2), "others")
    assert shelf.index.stats().evicted == 2
    assert shelf.used == (0, 4)
    assert {block.slot for block in held.blocks}.isdisjoint(
        block.slot for block in shelf.lease(names_of("b", 2)).blocks
    )
    shelf.release(held.lease)
    assert shelf.used == (2, 2)


def test_readers_end_in_peace(ground):
    """Whoever has a lease pulls right bytes; nobody else finds anything; other tenants notice nothing."""

    async def story():
        node = ground.node()
        async with clients_of(ground, node, node) as (client, other):
            theirs, others = ground.names("t", COUNT), ground.names("o", COUNT)
            assert await publish(ground, client, theirs, tenant="theirs") == COUNT
            assert await publish(ground, client, others, tenant="others") == COUNT
            match = await client.lookup(span(theirs))
            reservation = await client.reserve(span(ground.names("w", 1)), tenant="theirs")
            wait = asyncio.create_task(other.lookup(span(ground.names("w", 1)), wait_s=30))
            assert reservation.claims == (Claim.GRANTED,)
            await other.erase("theirs")
            assert not len(await wait), "nobody computes it any more"
            assert await client.publish(reservation, ground.payloads(ground.names("w", 1))) == 0
            assert not len(await other.lookup(span(theirs)))
            room = ground.room(COUNT)
            assert await client.pull(match, room) == COUNT
            assert all(np.array_equal(a, b.data) for a, b in zip(room, ground.payloads(theirs), strict=True))
            stats = await client.stats()
            assert (stats.committed, stats.erased) == (2 * COUNT, COUNT)
            assert await client.release(match.lease)
            await client.release(reservation.lease)
            assert (await client.stats()).committed_by_tenant == {"others": COUNT}
            assert await pulled(ground, other, others) == COUNT
            await nothing_held(ground, client, other)

    run(story())


@pytest.mark.parametrize("where", ["sender", "receiver"])
def test_erased_while_blocks_flow(ground, where):
    """Where they come from, what is on its way arrives; where they come to, nothing of it is kept."""

    async def story():
        async with wires(1) as (wire,):
            one, two = behind(ground, wire, slots=500), ground.peer(slots=500, start=False)
            ground.start(one, two)
            async with clients_of(ground, one, two) as (writer, reader):
                names = ground.names("a", 400)
                assert await publish(ground, writer, names) == 400
                wire.hold_at = 2 * 2**20
                pull = asyncio.create_task(pulled(ground, reader, names, holder=one.address))
                await in_the_middle(wire, pull)
                client = {"sender": writer, "receiver": reader}[where]
                await client.erase("t")
                wire.cut()
                good = await pull
                assert good < 400
                await nothing_held(ground, writer, reader)
                stats = await client.stats()
                assert stats.committed == 0
                assert stats.free == stats.slots

    run_unless_starved(story)
