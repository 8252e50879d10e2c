"""The node inside this process: what it does about itself, and the bounds of what it reads."""

import asyncio

import msgspec
import pytest

from kvferry.common.config import StoreConfig
from kvferry.common.hashing import Span
from kvferry.common.store_api import Located, Match
from kvferry.kvstore import node as node_module
from kvferry.kvstore import protocol as say
from kvferry.kvstore.node import Node, listen
from kvferry.kvstore.protocol import ProtocolError
from kvferry.kvstore.slots import STEP

NAME = b"n" * 32
SPAN = Span((NAME,), 0, b"r" * 32, NAME)


@pytest.mark.parametrize("slots", [4, 50_000])
def test_a_damaged_index_ends_the_node(slots, ground, monkeypatch):
    monkeypatch.setattr(node_module, "QUIET_S", 0.05)
    monkeypatch.setattr(node_module, "CHECK_EVERY_S", 0.05)

    async def story():
        config = StoreConfig(socket=ground.node(start=False).socket, size_bytes=2**20, lease_s=0.2)
        damaged = Node(config, arena=-1)
        damaged._index.divide(slots, 4096)
        damaged._slots = slots
        damaged._index._table.free.append(0)
        with listen(config) as listener, pytest.raises(RuntimeError, match="not a partition"):
            await asyncio.wait_for(damaged.run(listener, asyncio.Event()), 10)

    asyncio.run(story())


def test_others_have_a_turn_after_each_step_of_a_check(ground):
    async def story():
        node = Node(StoreConfig(socket=ground.node(start=False).socket, size_bytes=2**20), arena=-1)
        node._index.divide(50_000, 4096)
        turns = 0

        async def take_turns():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        others = asyncio.create_task(take_turns())
        assert await node._check()
        others.cancel()
        steps = sum(1 for _ in node._index.checking())
        assert turns >= steps >= 50_000 / STEP

    asyncio.run(story())


def test_a_check_is_given_up_when_the_index_changes(ground):
    async def story():
        node = Node(StoreConfig(socket=ground.node(start=False).socket, size_bytes=2**20), arena=-1)
        index = node._index
        index.divide(50_000, 4096)
        connection = index.connect()
        lease = connection + 1
        for change in (
            lambda: index.reserve(connection, SPAN, tenant="t"),
            lambda: index.withdraw(connection, lease, (NAME,)),
            lambda: index.release(connection, lease),
            index.connect,
        ):
            checking = asyncio.create_task(node._check())
            for _ in range(3):
                await asyncio.sleep(0)
            assert not checking.done()
            change()
            assert not await checking
        assert await node._check()

    asyncio.run(story())


@pytest.mark.parametrize(
    "message",
    [
        say.Lookup(1, SPAN, "tenant", "host:1", 1.5, False),
        say.Reserve(2, Span((NAME, b"m" * 32), 5, b"r" * 32, b"a" * 32), "tenant"),
        say.Grant(3, 7, (NAME,)),
        say.Commit(4, 7, (say.Written(NAME, b"r" * 32, 5, b"s" * 16, b"c" * 128),)),
        say.Abort(5, (1, 2)),
        say.Release(6, 7),
        say.Renew(7),
        say.Quarantine(8, NAME, 3),
        say.Stats(9),
    ],
    ids=lambda message: type(message).__name__,
)
def test_requests_survive_the_wire(message):
    frame = say.encode(message)
    assert say.body_length(frame[:4]) == len(frame) - 4
    assert say.decode("request", frame[4:]) == message


@pytest.mark.parametrize(
    "message",
    [
        say.Lookup(1, (b"short",)),
        say.Lookup(1, (NAME,) * (say.MAX_NAMES + 1)),
        say.Lookup(1, (NAME,), -1.0),
        say.Lookup(1, SPAN, wait_s=float("nan")),
        say.Lookup(1, SPAN, wait_s=float("inf")),
        say.Lookup(-1, SPAN),
        say.Reserve(1, SPAN, "t" * 65),
        say.Commit(1, 1, (say.Written(NAME, NAME, 0, b"", b""),)),
        say.Commit(1, 1, (say.Written(NAME, NAME, -1, b"", b"c" * 16),)),
        say.Commit(1, 1, (say.Written(NAME, NAME, 0, b"", b"c" * 144),)),
        say.Abort(1, (2**32,)),
        say.Refused("not a request"),
    ],
)
def test_what_breaks_a_bound_is_refused(message):
    with pytest.raises(ProtocolError):
        say.decode("request", msgspec.msgpack.encode(message))


def test_the_longest_answer_fits_a_frame():
    block = Located(2**31, b"s" * 16, b"c" * 128)
    answer = say.Matched(1, Match((block,) * say.MAX_NAMES, 2**30, 2**40, b"b" * 16))
    assert len(say.encode(answer)) < say.MAX_FRAME_BYTES


def test_a_length_over_the_bound_is_refused():
    with pytest.raises(ProtocolError, match="is the most"):
        say.body_length((say.MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
