"""Store nodes that fetch blocks from one another over TCP: what arrives is right, or it is a miss, in time."""

import asyncio
import signal
import time

import pytest
from peer_stories import (
    SEAL,
    Starved,
    behind,
    clients_of,
    in_the_middle,
    known_elsewhere,
    nothing_held,
    publish,
    pulled,
    run,
    run_unless_starved,
    said_to_be_at,
    wires,
)
from spans import span

MANY = 1000  # blocks that several connections share
SOME = 300  # that come by one, in parts


@pytest.mark.parametrize("seal", [None, SEAL], ids=["plain", "sealed"])
def test_blocks_come_from_where_they_were_computed(ground, seal):
    async def story():
        one, two = ground.peers(2, slots=200)
        async with clients_of(ground, one, two) as (writer, reader):
            assert (writer.address, reader.address) == (one.address, two.address)
            names = ground.names("a", 150)
            assert await publish(ground, writer, names, seal) == 150
            assert await pulled(ground, reader, names, seal) == 0, "nobody has said where they are"
            assert await pulled(ground, reader, names, seal, holder=one.address) == 150
            stats = await reader.stats()
            assert (stats.committed, stats.brought, stats.writing, stats.reserved) == (150, 150, 0, 0)
            stats = await writer.stats()
            assert (stats.sent, stats.blocks_found) == (150, 0), "what others look up is counted there"
            one.kill()
            assert await pulled(ground, reader, names, seal) == 150, "they have landed here"
        assert two.terminate() == 0

    run(story())


@pytest.fixture
def two_holders(ground):
    """A story's: two nodes behind wires that have the same blocks, and a third node, whose client may `pull`."""

    class Holders:
        def __init__(self, count: int):
            self._count = count

        async def __aenter__(self):
            self._wires = wires(2)
            self.wires = await self._wires.__aenter__()
            self.redis = ground.redis()
            config = {"slots": self._count + 8, "redis": self.redis.url}
            self.nodes = [behind(ground, wire, **config) for wire in self.wires]
            self.nodes.append(ground.peer(start=False, **config))
            ground.start(*self.nodes)
            self._clients = clients_of(ground, *self.nodes)
            self.clients = await self._clients.__aenter__()
            self.names = ground.names("a", self._count)
            first, second, self.reader = self.clients
            assert await publish(ground, first, self.names) == self._count
            assert await pulled(ground, second, self.names, holder=self.nodes[0].address) == self._count
            await said_to_be_at(ground, self.redis, self._count, self.nodes[1].address)
            for wire in self.wires:
                wire.sent = 0
            return self

        def pull(self, **lookup):
            return pulled(ground, self.reader, self.names, holder=self.nodes[0].address, **lookup)

        async def __aexit__(self, *error):
            await self._clients.__aexit__(*error)
            await self._wires.__aexit__(*error)

    return Holders


def test_a_fetch_is_spread_over_all_who_have_it(ground, two_holders):
    async def story():
        async with two_holders(MANY) as they:
            if (good := await they.pull()) < MANY:
                raise Starved(f"a holder was given up as slow, and the pull ended with {good} blocks")
            shares = [wire.sent / (MANY * ground.block_bytes) for wire in they.wires]
            print("shares", [f"{share:.2f}" for share in shares])
            assert sum(shares) == pytest.approx(1.0, abs=0.01), "nothing is sent twice"
            assert min(shares) > 0.4
            assert (await they.reader.stats()).brought == MANY
            await nothing_held(ground, *they.clients)

    run_unless_starved(story)


@pytest.mark.parametrize(
    "fault",
    [
        "killed",
        "stopped",
        pytest.param("silent", marks=pytest.mark.long),
        pytest.param("closed", marks=pytest.mark.long),
    ],
)
def test_what_one_holder_does_not_deliver_the_other_does(ground, two_holders, fault):
    """Something happens to it while bytes flow: the wire keeps back what follows."""

    async def story():
        async with two_holders(SOME) as they:
            wire, node = they.wires[0], they.nodes[0]
            wire.hold_at = 2 * 2**20
            pull = asyncio.create_task(they.pull())
            await in_the_middle(wire, pull)
            assert not pull.done()
            happened = time.monotonic()
            match fault:
                case "killed":
                    node.kill()
                    wire.cut()
                case "stopped":
                    node.stop()
                case "closed":
                    wire.cut()
            assert await pull == SOME, "all of it came"
            print(f"{fault}: all there {time.monotonic() - happened:.2f} s later")
            assert (await they.reader.stats()).brought == SOME
            wire.hold_at = None
            if fault == "stopped":
                node.resume()
            alive = they.clients[1:] if fault == "killed" else they.clients
            await nothing_held(ground, *alive)

    run_unless_starved(story)


def test_a_holder_that_stopped_before_is_not_waited_for(ground, two_holders):
    async def story():
        async with two_holders(SOME) as they:
            they.nodes[0].stop()
            assert await they.pull(within_s=10) == SOME
            they.nodes[0].resume()
            await nothing_held(ground, *they.clients)

    run(story())


@pytest.mark.parametrize("rate", [2e6, pytest.param(200e3, marks=pytest.mark.long)])
def test_the_only_holder_sends_too_slowly_to_wait_for(ground, rate):
    """What has come by then is right; the rest is a miss, within the patience that its size deserves."""

    async def story():
        async with wires(1) as (wire,):
            one, two = behind(ground, wire, slots=SOME + 8), ground.peer(slots=SOME + 8, start=False)
            ground.start(one, two)
            async with clients_of(ground, one, two) as (writer, reader):
                names = ground.names("a", SOME)
                assert await publish(ground, writer, names) == len(names)
                wire.rate = rate
                good = await pulled(ground, reader, names, holder=one.address, within_s=12)
                assert good < len(names)
                wire.rate = 0.0
                await nothing_held(ground, reader)
                assert (await reader.stats()).committed >= good

                async def healed():
                    return await pulled(ground, reader, names, holder=one.address) == len(names)

                await ground.until(healed, 20)
                await nothing_held(ground, writer, reader)

    run(story())


def test_a_restarted_peer_has_nothing_and_is_found_again(ground):
    async def story():
        redis = ground.redis()
        one, two = ground.peers(2, slots=200, redis=redis.url)
        async with clients_of(ground, one, two) as (writer, reader):
            names, others = ground.names("a", 100), ground.names("b", 50)
            assert await publish(ground, writer, names) == 100
            assert await publish(ground, writer, others) == 50
            await known_elsewhere(ground, reader, others)
            assert await pulled(ground, reader, others) == 50, "so it was met"
            one.kill()
            one.start()
            assert await pulled(ground, reader, names, within_s=1.0) == 0, "the hint is stale"
            assert await pulled(ground, reader, names, holder=one.address, within_s=1.0) == 0
            await ground.until(lambda: writer.connects == 2)
            assert await publish(ground, writer, names) == 100

            async def healed():
                return await pulled(ground, reader, names) == 100

            await ground.until(healed)
            await nothing_held(ground, writer, reader)

    run(story())


def test_what_does_not_fit_is_a_miss(ground):
    async def story():
        one, two = ground.peer(slots=200, start=False), ground.peer(slots=40, start=False)
        ground.start(one, two)
        async with clients_of(ground, one, two) as (writer, reader):
            names = ground.names("a", 150)
            assert await publish(ground, writer, names) == 150
            slots = (await reader.stats()).slots
            assert await pulled(ground, reader, names, holder=one.address, within_s=5) == slots
            await nothing_held(ground, writer, reader)
            kept = ground.names("kept", slots)
            assert await publish(ground, reader, kept) == slots, "and gives way as all others do"
            match = await reader.lookup(span(kept))
            assert await pulled(ground, reader, names, holder=one.address, within_s=5) == 0, "all is leased"
            assert await reader.release(match.lease)
            await nothing_held(ground, writer, reader)

    run(story())


def test_more_comes_than_a_worker_may_be_writing(ground):
    async def story():
        one, two = ground.peer(slots=200, start=False), ground.peer(slots=200, writing=40, start=False)
        ground.start(one, two)
        async with clients_of(ground, one, two) as (writer, reader):
            names = ground.names("a", 150)
            assert await publish(ground, writer, names) == 150
            assert await pulled(ground, reader, names, holder=one.address) == 150
            await nothing_held(ground, writer, reader)

    run(story())


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_node_ends_in_time_while_blocks_flow(ground, who, capfd):
    async def story():
        async with wires(1) as (wire,):
            one, two = behind(ground, wire, slots=SOME + 8), ground.peer(slots=SOME + 8, start=False)
            ground.start(one, two)
            async with clients_of(ground, one, two) as (writer, reader):
                names = ground.names("a", SOME)
                assert await publish(ground, writer, names) == len(names)
                wire.hold_at = 2 * 2**20
                pull = asyncio.create_task(pulled(ground, reader, names, holder=one.address))
                await in_the_middle(wire, pull)
                ending = {"sender": one, "receiver": two}[who]
                begun = time.monotonic()
                ending.process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(ending.process.wait, 10) == 0
                took = time.monotonic() - begun
                wire.cut()
                assert await pull < len(names)
            print(f"ended after {took:.2f} s")
            assert took < 2.0
            assert not ending.socket.exists()

    run_unless_starved(story)
    told = capfd.readouterr().err
    assert "Traceback" not in told, told
    assert "never" not in told, told  # retrieved, awaited
