"""What a store says of itself and of its links, over real connections."""

import asyncio
import os
import time
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from kvferry.common.errors import IncompatibleNode
from kvferry.kvstore import measuring, peering
from kvferry.kvstore.network import accept, listen_for_peers
from kvferry.kvstore.peering import MAX_PROBE, Identity, Probe
from kvferry.kvstore.sending import Sender

SECRET = b"a secret of 16 bytes or more"


def identity(address: str, secret: bytes = SECRET) -> Identity:
    return Identity("kvferry", address, os.urandom(16), secret)


@asynccontextmanager
async def store(secret: bytes = SECRET):
    """A node's side towards others, at the address that it gives."""
    listener = listen_for_peers("127.0.0.1:0")
    me = identity(f"127.0.0.1:{listener.getsockname()[1]}", secret)
    sender = Sender(me, None, None)

    async def answer() -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(sender.serve(await accept(listener)))

    task = asyncio.create_task(answer())
    try:
        yield me.address
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        listener.close()
        await sender.close()


def run(check) -> None:
    """`check(address, ...)` with as many stores as it takes."""

    async def with_stores() -> None:
        async with AsyncExitStack() as stack:
            await check(*[await stack.enter_async_context(store()) for _ in range(check.__code__.co_argcount)])

    asyncio.run(asyncio.wait_for(with_stores(), 30))


def test_who_it_is_and_what_its_clock_says():
    async def check(one):
        async with measuring.connection(identity("doctor"), one) as (peer, met):
            assert met.address == one
            for _ in range(2):
                told, seconds = await measuring.ask(peer, Probe(0), 5)
                assert abs(told.clock - time.time()) < 1
                assert 0 < seconds < 1
                assert (told.release, told.block_bytes, told.problem) == ("0.1.0", 0, "")

    run(check)


@pytest.mark.parametrize("size", [1, 2**20 + 1, MAX_PROBE])
def test_the_link_between_two(size):
    async def check(one, other):
        async with measuring.connection(identity("doctor"), one) as (peer, _):
            told, _ = await measuring.ask(peer, Probe(size, other), 10)
            assert told.problem == ""
            assert 0 < told.round_trip_s < 1
            assert told.bytes_per_s > 0
            assert (await measuring.ask(peer, Probe(0), 5))[0].bytes_per_s == 0, "the connection goes on"

    run(check)


def test_all_the_zeros_come():
    async def check(one):
        async with measuring.connection(identity("doctor"), one) as (peer, _):
            await measuring.ask(peer, Probe(3 * 2**20 + 7), 5)
            assert await peering.exactly(peer, 3 * 2**20 + 7) == bytes(3 * 2**20 + 7)
            assert (await measuring.ask(peer, Probe(0), 5))[0].release

    run(check)


def test_a_link_that_is_not_there():
    async def check(one):
        async with measuring.connection(identity("doctor"), one) as (peer, _), store(b"x" * 32) as stranger:
            told = {what: (await measuring.ask(peer, Probe(2**20, what), 5))[0].problem
                    for what in ("127.0.0.1:1", "nonsense", stranger)}  # fmt: skip
        assert told["127.0.0.1:1"] == "Connection refused"
        assert told["nonsense"] == "its address is not HOST:PORT"
        assert told[stranger] == "the two stores do not know the same secret (--peer-secret-file)"

    run(check)


def test_who_does_not_know_the_secret_learns_nothing():
    async def check(one):
        with pytest.raises(IncompatibleNode, match="the same secret"):
            async with measuring.connection(identity("doctor", b"y" * 32), one):
                raise AssertionError("it was let in")

    run(check)


def test_too_much_at_once_is_refused():
    async def check(one):
        async with measuring.connection(identity("doctor"), one) as (peer, _):
            with pytest.raises(EOFError):
                await measuring.ask(peer, Probe(MAX_PROBE + 1), 5)

    run(check)
