"""Stores that do not belong together: neither serves the other, and both say why, once."""

import asyncio
import json
import logging
import socket

import msgspec
import pytest
from impostor import SECRET, impostor, me
from peer_stories import clients_of, nothing_held, publish, pulled, run

from kvferry.common.errors import IncompatibleNode
from kvferry.kvstore import peering
from kvferry.kvstore import protocol as say
from kvferry.kvstore.link import Link, Unreachable
from kvferry.kvstore.peering import Call, Challenge, Fetch, Sending, Sent
from kvferry.kvstore.peers import AWAY_FIRST_S, AWAY_MOST_S, Peer
from kvferry.kvstore.protocol import MAX_WORDS, ProtocolError

TRIES = 100
LONG = "no\nERROR fire" * 100_000
NO_ADDRESSES = ["nonsense", "127.0.0.1:99999", "127.0.0.1:" + "9" * 30, "[::1", ":", "x" * 290 + ":1", "h\0:1", "é:1"]


def told(capfd, *parts) -> list[str]:
    """The lines of the nodes' logs in which all of `parts` stand."""
    lines = [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    return [line for line in lines if all(part in line for part in parts)]


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ({"secret": "another secret of stores"}, {}, "the same secret (--peer-secret-file)"),
        ({"cluster": "other"}, {}, "is of the cluster 'kvferry', the caller of 'other'"),
        ({}, {"block_bytes": 128 * 1024}, "has blocks of 65536 bytes, the caller of 131072"),
    ],
    ids=["secret", "cluster", "block_size"],
)
def test_strangers_are_refused_with_a_reason_in_both_logs(ground, config, changes, words, capfd):
    async def story():
        one, two = ground.peer(start=False), ground.peer(start=False, **config)
        ground.start(one, two)
        async with clients_of(ground, one) as (writer,), clients_of(ground, two, **changes) as (reader,):
            names = ground.names("a", 20)
            assert await publish(ground, writer, names) == 20
            for _ in range(TRIES):
                assert await pulled(ground, reader, names, holder=one.address, within_s=5) == 0
            await nothing_held(ground, writer, reader)
            assert (await reader.stats()).brought == 0
            return one, two

    one, _ = run(story())
    lines = told(capfd, words)
    assert len(lines) == 2, lines
    assert [line for line in lines if line.startswith(f"the store at {one.address}: ")], "the one who called"
    assert [line for line in lines if line.startswith("refused a store at 127.0.0.1: ")], "the one who was called"


def test_another_version_is_refused_by_whoever_hears_of_it(ground, capfd):
    async def story():
        node = ground.peer()
        loop = asyncio.get_running_loop()
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", int(node.address.split(":")[1]))) as peer:
                peer.setblocking(False)
                await loop.sock_sendall(peer, peering.frame(Call(2, "kvferry", "ask", "127.0.0.1:1", bytes(32))))
                with pytest.raises(IncompatibleNode, match="speaks protocol version 1, the caller 2"):
                    await peering.hear(peer, Challenge)

        async def answer(peer):
            call = await peering.hear(peer, Call)
            answer = Challenge(2, "kvferry", "127.0.0.1:1", bytes(16), bytes(32), bytes(32))
            await loop.sock_sendall(peer, peering.frame(answer))
            with pytest.raises(IncompatibleNode, match=f"speaks protocol version 2, the caller {call.version}"):
                await peering.hear(peer, peering.Proof)

        async with clients_of(ground, node) as (client,), impostor(answer) as (address, met):
            for _ in range(TRIES):
                assert await pulled(ground, client, ground.names("a", 5), holder=address, within_s=2) == 0
            await asyncio.gather(*met)
            assert len(met) == 1, "it is left alone"

    run(story())
    refused, met = sorted(told(capfd, "protocol version"))
    assert refused.startswith("refused a store at 127.0.0.1: ")
    assert met.startswith("the store at 127.0.0.1:")


def test_neither_side_can_be_answered_with_its_own_words():
    """Who does not know the secret and passes on what others say proves nothing."""

    async def story():
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for peer in (ours, theirs):
                peer.setblocking(False)
            calling = asyncio.create_task(peering.call(ours, me(), "ask"))
            call = await peering.hear(theirs, Call)
            mirrored = Challenge(call.version, call.cluster, call.address, bytes(16), call.nonce, bytes(32))
            proof = peering.proof(SECRET.encode(), "caller", call, mirrored)
            mirrored = Challenge(call.version, call.cluster, call.address, bytes(16), call.nonce, proof)
            await loop.sock_sendall(theirs, peering.frame(mirrored))
            with pytest.raises(IncompatibleNode, match="the same secret"):
                await calling
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for peer in (ours, theirs):
                peer.setblocking(False)
            answering = asyncio.create_task(peering.answer(ours, me()))
            await loop.sock_sendall(theirs, peering.frame(Call(1, "kvferry", "ask", "127.0.0.1:1", bytes(32))))
            challenge = await peering.hear(theirs, Challenge)
            await loop.sock_sendall(theirs, peering.frame(peering.Proof(challenge.proof)))
            with pytest.raises(IncompatibleNode, match="the same secret"):
                await answering

    run(story())


def test_what_a_refusal_says_makes_no_lines_of_its_own():
    async def story():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(theirs, peering.frame(peering.Refused("no\nERROR fire" * 99)))
            with pytest.raises(ProtocolError, match=r"^no\?ERROR fire") as refused:
                await peering.hear(ours, Challenge)
            assert len(str(refused.value)) <= MAX_WORDS

    run(story())


@pytest.mark.parametrize("body", [{"type": "refused", "reason": LONG}, {"type": LONG}], ids=["refusal", "nonsense"])
def test_what_a_store_that_is_asked_answers_does_not_fill_the_log(caplog, body):
    async def story():
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            link = await Link.over(ours, "127.0.0.1:1", bytes(16))
            said = msgspec.msgpack.encode(body)
            await asyncio.get_running_loop().sock_sendall(theirs, say.LENGTH.pack(len(said)) + said)
            await link.lost.wait()
            with pytest.raises(Unreachable):
                await link.request(say.Stats(link.next_id()), say.Counted, 1.0)
            await link.close()

    run(story())
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "ERROR fire" in line]
    assert all(len(line) < 2 * MAX_WORDS and "\n" not in line for line in lines), lines


LIES = {
    "too many": "more blocks are sent than were asked for",
    "none": "",
    "cut": "the connection closed in the middle of a block",
    "noise": "a frame of",
    "nothing at all": "no answer within 1 s",
}


def test_one_that_sends_what_was_not_asked_for_costs_a_miss(ground, capfd):
    """It knows the secret, and lies."""

    async def story():
        node = ground.peer()
        async with clients_of(ground, node) as (client,):
            for lie in LIES:
                names = ground.names(lie, 9)
                async with impostor(lambda peer, lie=lie: send(peer, lie, ground.block_bytes)) as (address, met):
                    assert await pulled(ground, client, names, holder=address, within_s=5) == 0, lie
                    await nothing_held(ground, client)
                assert len(met) == 1, lie
                stats = await client.stats()
                assert (stats.brought, stats.bad_blocks) == (0, 0), lie
                assert await publish(ground, client, names) == 9, "it can be computed here"
                assert await pulled(ground, client, names) == 9
        assert node.terminate() == 0

    run(story())
    err = capfd.readouterr().err
    assert all(words in err for words in LIES.values()), err
    assert "Traceback" not in err, err


async def send(peer: socket.socket, lie: str, block_bytes: int) -> None:
    loop = asyncio.get_running_loop()
    await peering.answer(peer, me())
    fetch = await peering.hear(peer, Fetch)
    block, count = Sent(b"", bytes(32)), len(fetch.names)
    match lie:
        case "too many":
            await loop.sock_sendall(peer, peering.frame(Sending((block,) * (count + 1))) + bytes(block_bytes))
        case "none":
            await loop.sock_sendall(peer, peering.frame(Sending(())))
        case "cut":
            await loop.sock_sendall(peer, peering.frame(Sending((block,) * count)) + bytes(block_bytes * 2 + 100))
        case "noise":
            await loop.sock_sendall(peer, b"\xff" * 1000)
        case "nothing at all":
            await loop.sock_recv(peer, 1)


def test_an_address_that_is_none_costs_a_miss(ground, capfd):
    async def story():
        node = ground.peer()
        async with clients_of(ground, node) as (client,):
            for i, holder in enumerate(NO_ADDRESSES):
                names = ground.names(f"n{i}", 3)
                assert await pulled(ground, client, names, holder=holder, within_s=5) == 0, holder
                await nothing_held(ground, client)
                assert await publish(ground, client, names) == 3
            assert client.connects == 1

    run(story())
    assert "Traceback" not in capfd.readouterr().err


def test_one_that_is_away_for_days_is_tried_again_and_again(caplog):
    caplog.set_level(logging.INFO)
    peer, now = Peer("127.0.0.1:1"), 0.0
    for _ in range(5000):
        peer.failed(OSError("no route"), now)
        assert now + AWAY_FIRST_S <= peer.away_until <= now + AWAY_MOST_S
        now = peer.away_until
    peer.worked()
    peer.worked()
    peer.failed(OSError("no route"), now)
    assert peer.away_until == now + AWAY_FIRST_S, "it was well, so it is tried soon"
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"the store at 127.0.0.1:1{words}" for words in (": no route", " is back", ": no route")]
