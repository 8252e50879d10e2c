"""Redis and the links between stores fail: right bytes or a miss within the deadline, never an exception, and it heals.

One host computes, the other pulls all the time; each fault happens in the middle of that.
"""

import time

import pytest
from peer_stories import behind, clients_of, known_elsewhere, nothing_held, publish, pulled, run, wires
from redis_proxy import Proxy
from spans import span

from kvferry.common.store_api import Claim

COUNT = 30
PAUSE_S = 5.0
BUSY_S = 1.0  # what this machine's other work may take from a call


class Pair:
    """Two nodes at one Redis. `turn` computes at the first what the second then looks for."""

    def __init__(self, ground, url, *nodes):
        self.ground = ground
        self.nodes = nodes or ground.peers(2, slots=2000, redis=url)
        self.slowest = 0.0
        self._turns = 0

    async def __aenter__(self):
        self._clients = clients_of(self.ground, *self.nodes)
        self.writer, self.reader = await self._clients.__aenter__()
        return self

    async def __aexit__(self, *error):
        if error[0] is None:
            await nothing_held(self.ground, self.writer, self.reader)
        await self._clients.__aexit__(*error)

    async def turn(self, within_s=BUSY_S) -> int:
        """How many of a fresh prefix's blocks the second could have from the first; the rest it computes."""
        ground = self.ground
        self._turns += 1
        names = ground.names(f"turn{self._turns}", COUNT)
        assert await publish(ground, self.writer, names) == COUNT
        begun = time.monotonic()
        good = await pulled(ground, self.reader, names, within_s=within_s)
        self.slowest = max(self.slowest, time.monotonic() - begun)
        if not good:
            assert await publish(ground, self.reader, names) == COUNT, "nobody is in the way"
        return good

    async def heals(self, seconds=15.0) -> None:
        """Until what the first computes is found by the second."""
        names = self.ground.names(f"healed{self._turns}", COUNT)

        async def healed() -> bool:
            await publish(self.ground, self.writer, names)
            return await pulled(self.ground, self.reader, names, within_s=BUSY_S) == COUNT

        await self.ground.until(healed, seconds)


@pytest.mark.parametrize("fault", ["killed", "flushed", "paused"])
def test_redis_fails(ground, fault):
    """Killed and paused: misses, at once, but blocks are fetched from a holder that is named. Flushed: misses of what
    was told before."""

    async def story():
        redis = ground.redis()
        async with Pair(ground, redis.url) as pair:
            before = ground.names("before", COUNT)
            assert await publish(ground, pair.writer, before) == COUNT
            await known_elsewhere(ground, pair.reader, before)
            await pair.heals()
            begun = time.monotonic()
            match fault:
                case "killed":
                    redis.kill()
                case "flushed":
                    redis.flush()
                case "paused":
                    redis.pause()
            assert await pulled(ground, pair.reader, before, within_s=BUSY_S) == 0
            if fault != "flushed":
                while time.monotonic() - begun < (PAUSE_S if fault == "paused" else 1.0):
                    assert await pair.turn() == 0
                names = ground.names("named", COUNT)
                assert await publish(ground, pair.writer, names) == COUNT
                assert await pulled(ground, pair.reader, names, holder=pair.nodes[0].address) == COUNT
            match fault:
                case "killed":
                    redis.start()
                case "paused":
                    redis.resume()
            await pair.heals()
            print(f"{fault}: the slowest look-up took {1000 * pair.slowest:.0f} ms")

    run(story())


def test_redis_is_slow(ground):
    """By 100 ms, twice its budget: as on a miss, and nobody waits for it again and again."""

    async def story():
        redis = ground.redis()
        proxy = await Proxy(redis.port).start()
        async with Pair(ground, f"redis://127.0.0.1:{proxy.port}") as pair:
            await pair.heals()
            proxy.delay = lambda: 0.1
            for _ in range(10):
                assert await pair.turn() == 0
            begun = time.monotonic()
            for i in range(20):
                await pair.reader.lookup(span(ground.names(f"x{i}", COUNT)), tenant="t")
            took = time.monotonic() - begun
            print(f"20 look-ups took {1000 * took:.0f} ms")
            assert took < 20 * 0.05
            proxy.delay = lambda: 0.0
            await pair.heals()
        await proxy.end()

    run(story())


def test_a_slow_link_still_delivers(ground):
    """Each piece is late by 100 ms, either way."""

    async def story():
        redis = ground.redis()
        async with wires(1) as (wire,):
            config = {"slots": 300, "redis": redis.url}
            nodes = [behind(ground, wire, **config), ground.peer(start=False, **config)]
            ground.start(*nodes)
            wire.delay = 0.1
            async with Pair(ground, redis.url, *nodes) as pair:
                names = ground.names("a", 200)
                assert await publish(ground, pair.writer, names) == 200
                await known_elsewhere(ground, pair.reader, names)
                begun = time.monotonic()
                assert await pulled(ground, pair.reader, names, within_s=5) == 200
                print(f"200 blocks took {time.monotonic() - begun:.2f} s")

    run(story())


def test_a_link_that_is_cut_is_a_miss_and_heals(ground):
    """Connections are reset, and new ones lead nowhere, for as long as it lasts. What is computed meanwhile is found
    later."""

    async def story():
        redis = ground.redis()
        async with wires(1) as (wire,):
            config = {"slots": 300, "redis": redis.url}
            nodes = [behind(ground, wire, **config), ground.peer(start=False, **config)]
            ground.start(*nodes)
            async with Pair(ground, redis.url, *nodes) as pair:
                await pair.heals()
                wire.lead_to("127.0.0.1:1")
                wire.cut()
                names = ground.names("a", COUNT)
                assert await publish(ground, pair.writer, names) == COUNT
                await known_elsewhere(ground, pair.reader, names)
                assert await pulled(ground, pair.reader, names, within_s=BUSY_S) == 0
                reservation = await pair.reader.reserve(span(ground.names("b", COUNT)), tenant="t")
                assert set(reservation.claims) == {Claim.GRANTED}
                assert await pair.reader.release(reservation.lease)
                wire.lead_to(nodes[0].listen)

                async def healed():
                    return await pulled(ground, pair.reader, names) == COUNT

                await ground.until(healed, 15)

    run(story())
