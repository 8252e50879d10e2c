"""What stories of several store nodes have in common."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager

import numpy as np
from peer_wire import Wire
from redis_server import RedisServer
from spans import span

from kvferry.kvstore.client import StoreClient

SEAL = bytes(range(32))
TENANT = "t"


TRIES = 5


class Starved(Exception):
    """This machine was too busy for the story to happen."""


def run(story):
    return asyncio.run(asyncio.wait_for(story, 120))


def run_unless_starved(story):
    """Begins anew where there was too little of the machine."""
    for _ in range(TRIES - 1):
        try:
            return run(story())
        except Starved as reason:
            print(reason)
    return run(story())


async def in_the_middle(wire: Wire, pull: asyncio.Task) -> None:
    """Until bytes have flowed and the wire keeps back what follows. Raises Starved if the pull ends before that."""
    holding = asyncio.create_task(wire.holding.wait())
    await asyncio.wait([pull, holding], return_when=asyncio.FIRST_COMPLETED)
    if not holding.done():
        holding.cancel()
        raise Starved(f"the holder was given up as slow, and the pull ended with {await pull} blocks")


@asynccontextmanager
async def clients_of(ground, *nodes, **changes):
    """A connected client for each node."""
    clients = [ground.client(node, **changes) for node in nodes]
    for client in clients:
        await client.start()
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()


@asynccontextmanager
async def wires(count: int):
    laid = [await Wire().start() for _ in range(count)]
    try:
        yield laid
    finally:
        for wire in laid:
            await wire.end()


def behind(ground, wire: Wire, **config):
    """A node, not started yet, that others reach over a wire."""
    node = ground.peer(start=False, advertise=wire.address, **config)
    wire.lead_to(node.listen)
    return node


async def publish(ground, client: StoreClient, names: Sequence[bytes], seal=None, tenant=TENANT) -> int:
    reservation = await client.reserve(span(names), tenant=tenant)
    there = await client.publish(reservation, ground.payloads(names), seal)
    await client.release(reservation.lease)
    return there


async def pulled(ground, client: StoreClient, names: Sequence[bytes], seal=None, within_s=20.0, **lookup) -> int:
    """How many leading blocks could be had, all of them right, in that time."""
    begun = time.monotonic()
    match = await client.lookup(span(names), tenant=TENANT, **lookup)
    room = ground.room(len(match))
    good = await client.pull(match, room, seal)
    held = await client.release(match.lease) if match.lease else True
    took = time.monotonic() - begun
    expect = ground.payloads(names[:good])
    assert all(np.array_equal(got, sent.data) for got, sent in zip(room, expect, strict=False))
    assert took < within_s, f"{good} blocks took {took:.1f} s"
    return good if held else 0


async def known_elsewhere(ground, client: StoreClient, names: Sequence[bytes]) -> None:
    """Until this client's node has heard that others have all of it."""

    async def known() -> bool:
        return (await client.lookup(span(names), lease=False)).coming == len(names)

    await ground.until(known)


async def said_to_be_at(ground, redis: RedisServer, count: int, address: str) -> None:
    """Until Redis has so many hints of a node."""

    def said() -> bool:
        with redis.client() as client:
            hints = client.keys("*:[01]")
            return count <= sum(value.endswith(address.encode()) for value in client.mget(hints)) if hints else False

    await ground.until(said)


async def nothing_held(ground, *clients: StoreClient) -> None:
    """Until their nodes have no lease, no reservation and no slot in writing."""

    async def quiet() -> bool:
        all_stats = [await client.stats() for client in clients]
        return all(s is not None and not (s.leases or s.reserved or s.writing) for s in all_stats)

    await ground.until(quiet)
