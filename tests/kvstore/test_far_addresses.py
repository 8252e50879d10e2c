"""Where other stores are: names with several addresses, and stores that left for good."""

import asyncio
import logging
import socket

import pytest
from impostor import me
from peer_stories import clients_of, nothing_held, publish, pulled, run

from kvferry.common.clock import ManualClock
from kvferry.kvstore.peers import CONNECT_S, FORGOTTEN_S, Peers, connect

NAME = "a-store-of-two-addresses"


@pytest.fixture
def both_addresses(monkeypatch):
    """`NAME`'s, in the order in which they are found."""
    found = []
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, *_, **__: [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)) for address in found
        ],
    )
    return found


@pytest.mark.parametrize("first", ["refuses", "does_not_answer"])
def test_a_name_is_reached_at_the_address_where_it_answers(both_addresses, first):
    async def story():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            both_addresses[:] = ["127.0.0.2", "127.0.0.1"]
            waiting = []
            if first == "does_not_answer":
                full = socket.socket()
                full.bind(("127.0.0.2", port))
                full.listen(0)
                waiting = [socket.socket() for _ in range(4)]
                for peer in waiting:  # more than it lets wait
                    peer.setblocking(False)
                    assert peer.connect_ex(("127.0.0.2", port))
                waiting.append(full)
            async with asyncio.timeout(CONNECT_S):
                peer = await connect(f"{NAME}:{port}")
            assert peer.getpeername() == ("127.0.0.1", port)
            for one in (peer, *waiting):
                one.close()
            listener.close()
            with pytest.raises(ConnectionRefusedError):
                await connect(f"{NAME}:{port}")

    run(story())


def test_stores_that_left_for_good_leave_no_descriptor(ground):
    """Nobody asks them anything any more."""

    async def story():
        two = ground.peer(slots=300)
        async with clients_of(ground, two) as (reader,):
            alone = two.open_fds()
            for turn in range(3):
                one = ground.peer(slots=100)
                async with clients_of(ground, one) as (writer,):
                    names = ground.names(f"{turn}", 50)
                    assert await publish(ground, writer, names) == 50
                    assert await pulled(ground, reader, names, holder=one.address) == 50
                    await nothing_held(ground, reader)
                    assert two.open_fds() > alone, "the connection is kept"
                one.kill()
            await ground.until(lambda: two.open_fds() <= alone)

    run(story())


def test_a_store_of_which_nothing_is_heard_is_forgotten(caplog):
    caplog.set_level(logging.INFO)

    def told() -> int:
        return sum("no route" in record.getMessage() for record in caplog.records)

    async def story():
        clock = ManualClock()
        peers = Peers(me(), clock)
        peers.failed("127.0.0.1:2", OSError("no route"))
        for _ in range(3):
            clock.advance(FORGOTTEN_S - 1)
            peers.tick()
            peers.failed("127.0.0.1:2", OSError("no route"))
        assert told() == 1, "it is known still"
        async with peers.turn("127.0.0.1:2"):
            clock.advance(FORGOTTEN_S + 1)
            peers.tick()
        peers.failed("127.0.0.1:2", OSError("no route"))
        assert told() == 1, "something was under way"
        clock.advance(FORGOTTEN_S + 1)
        peers.tick()
        peers.failed("127.0.0.1:2", OSError("no route"))
        assert told() == 2

    run(story())
