"""The single flight across hosts: a prefix that one computes is not computed by another, who has its blocks then. All
that the two nodes share is a real Redis."""

import asyncio
import time

import pytest
from peer_stories import clients_of, nothing_held, publish, pulled, run
from spans import span

from kvferry.common.store_api import Claim, Reservation
from kvferry.kvstore.directory import CLAIM_S

COUNT = 100
SOON_S = 0.2  # from a death to the next one's grant
TRIES = 5  # of which the quickest counts: others use this machine's cores


def claims_in(redis) -> int:
    """How many Redis has."""
    with redis.client() as client:
        return sum(b":c:" in key for key in client.keys("*"))


async def compute(ground, redis, client, names) -> Reservation:
    """One that others know of: a busy machine may not tell Redis in time."""

    async def claimed() -> Reservation | None:
        before = claims_in(redis)
        reservation = await client.reserve(span(names), tenant="t")
        assert set(reservation.claims) == {Claim.GRANTED}
        if claims_in(redis) > before:
            return reservation
        await client.release(reservation.lease)
        return None

    return await ground.until(claimed)


async def find_taken(ground, client, names) -> None:
    """By another host; as soon as Redis tells in time."""

    async def taken() -> bool:
        reservation = await client.reserve(span(names), tenant="t")
        if reservation.lease:
            await client.release(reservation.lease)
        return set(reservation.claims) == {Claim.TAKEN} and not reservation.lease

    await ground.until(taken)


def waiting(client, names, wait_s=30.0) -> asyncio.Task:
    return asyncio.create_task(client.lookup(span(names), tenant="t", wait_s=wait_s))


async def goes_on(wait: asyncio.Task) -> bool:
    """It is not over, nor is it soon."""
    done, _ = await asyncio.wait([wait], timeout=0.3)
    return not done


def test_of_two_who_want_a_prefix_at_once_one_computes_it(ground):
    async def story():
        one, two = ground.peers(2, slots=400, redis=ground.redis().url)
        async with clients_of(ground, one, two) as clients:
            turns = 0
            for attempt in range(20):
                names = ground.names(f"turn{attempt}", COUNT)
                reservations = await asyncio.gather(*(c.reserve(span(names), tenant="t") for c in clients))
                claims = [set(one.claims) for one in reservations]
                assert {Claim.GRANTED} in claims, "somebody computes"
                if claims == [{Claim.GRANTED}] * 2:  # on a busy machine Redis may be too late for one of them
                    for client, reservation in zip(clients, reservations, strict=True):
                        await client.release(reservation.lease)
                    await asyncio.sleep(0.2)
                    continue
                assert {Claim.TAKEN} in claims, "and nobody else"
                winner = claims.index({Claim.GRANTED})
                ours, theirs = clients[winner], clients[1 - winner]
                wait = waiting(theirs, names)
                for start in range(0, COUNT, 20):  # in chunks, as they are computed
                    assert not wait.done()
                    blocks = ground.payloads(names)[start : start + 20]
                    assert await ours.publish(reservations[winner], blocks) == 20
                match = await wait
                assert (len(match), match.miss) == (COUNT, None), "all of it, not only what was there first"
                assert await pulled(ground, theirs, names) == COUNT
                assert await theirs.release(match.lease)
                await ours.release(reservations[winner].lease)
                turns += 1
                brought = [(await client.stats()).brought for client in clients]
                assert sum(brought) == COUNT * turns
                if turns == 3:
                    break
            assert turns == 3
            await nothing_held(ground, *clients)

    run(story())


@pytest.mark.parametrize(("who", "within_s"), [("worker", SOON_S), ("node", 1.0)])
def test_when_the_owner_dies_the_next_goes_on(ground, who, within_s):
    async def story():
        redis = ground.redis()
        one, two = ground.peers(2, redis=redis.url)
        took = []
        async with clients_of(ground, two) as (client,):
            for turn in range(TRIES):
                names = ground.names(f"turn{turn}", 40)
                worker = ground.worker(one, f"turn{turn}", 40)
                assert await asyncio.to_thread(worker.line) == "reserved" + " granted" * 40
                await find_taken(ground, client, names)
                wait = waiting(client, names)
                assert await goes_on(wait)
                died = time.monotonic()
                if who == "worker":
                    worker.process.kill()
                else:
                    one.kill()
                assert not len(await wait)
                reservation = await client.reserve(span(names), tenant="t")
                took.append(time.monotonic() - died)
                assert set(reservation.claims) == {Claim.GRANTED}
                assert await client.release(reservation.lease)
                if took[-1] < within_s:
                    break
                if who == "node":
                    one.start()
            await nothing_held(ground, client)
        print(f"granted {[f'{1000 * one:.0f} ms' for one in took]} after the owner's {who} had died")
        assert min(took) < within_s

    run(story())


def test_of_several_who_wait_for_an_owner_that_dies_one_goes_on(ground):
    async def story():
        redis = ground.redis()
        one, *others = ground.peers(4, redis=redis.url)
        async with clients_of(ground, *others) as clients:
            granted = []
            for turn in range(TRIES):  # on a busy machine Redis may be too late for some of them
                names = ground.names(f"turn{turn}", 40)
                worker = ground.worker(one, f"turn{turn}", 40)
                assert await asyncio.to_thread(worker.line) == "reserved" + " granted" * 40
                for client in clients:
                    await find_taken(ground, client, names)
                waits = [waiting(client, names) for client in clients]
                worker.process.kill()
                assert [len(await wait) for wait in waits] == [0, 0, 0]
                reservations = await asyncio.gather(*(c.reserve(span(names), tenant="t") for c in clients))
                granted.append(sum(set(each.claims) == {Claim.GRANTED} for each in reservations))
                for client, each in zip(clients, reservations, strict=True):
                    if each.lease:
                        await client.release(each.lease)
                if granted[-1] == 1:
                    break
            print(f"of three, {granted} went on")
            assert granted[-1] == 1
            await nothing_held(ground, *clients)

    run(story())


def test_a_claim_is_kept_while_a_slow_fill_goes_on(ground):
    async def story():
        redis = ground.redis()
        one, two = ground.peers(2, redis=redis.url)
        async with clients_of(ground, one, two) as (owner, other):
            names = ground.names("a", 10)
            reservation = await compute(ground, redis, owner, names)
            await find_taken(ground, other, names)
            wait, begun = waiting(other, names), time.monotonic()
            with redis.client() as client:
                (claim,) = [key for key in client.keys("*") if b":c:" in key]
                while time.monotonic() - begun < 2.5 * CLAIM_S:
                    assert 0 < client.pttl(claim) <= 1000 * CLAIM_S
                    await asyncio.sleep(0.25)
                await find_taken(ground, other, names)
                assert not wait.done()
                assert await owner.publish(reservation, ground.payloads(names)) == 10
                assert len(match := await wait) == 10
                assert await other.pull(match, ground.room(10)) == 10
                assert await other.release(match.lease)
                await owner.release(reservation.lease)
            await nothing_held(ground, owner, other)

    run(story())


def test_an_owner_that_hangs_is_not_waited_for_to_the_end(ground):
    async def story():
        redis = ground.redis()
        one, two = ground.peers(2, redis=redis.url)
        async with clients_of(ground, one, two) as (owner, other):
            names = ground.names("a", 10)
            await compute(ground, redis, owner, names)
            await find_taken(ground, other, names)
            wait = waiting(other, names)
            assert await goes_on(wait)
            one.stop()
            begun = time.monotonic()
            assert not len(await wait)
            assert set((await other.reserve(span(names), tenant="t")).claims) == {Claim.GRANTED}
            print(f"granted {time.monotonic() - begun:.1f} s after the owner's node was stopped")
            assert time.monotonic() - begun < 10
            one.resume()
            assert await publish(ground, other, ground.names("b", 3)) == 3

    run(story())


def test_without_redis_both_compute_and_nothing_fails(ground):
    async def story():
        redis = ground.redis()
        one, two = ground.peers(2, redis=redis.url)
        async with clients_of(ground, one, two) as clients:
            redis.kill()
            names = ground.names("a", 20)
            for client in clients:
                reservation = await client.reserve(span(names), tenant="t")
                assert set(reservation.claims) == {Claim.GRANTED}
                assert await client.release(reservation.lease)
            assert [await publish(ground, client, names) for client in clients] == [20] * 2
            assert [await pulled(ground, client, names) for client in clients] == [20] * 2
            await nothing_held(ground, *clients)

    run(story())
