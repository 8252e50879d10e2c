"""Whatever is sent to a store, at its socket or at its port: it is answered or closed in time, nobody else is harmed,
and nothing is allocated that was only announced."""

import asyncio
import socket
import struct
import time

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from peer_stories import clients_of, nothing_held, publish, pulled, run

from kvferry.common.hashing import Span
from kvferry.kvstore import peering
from kvferry.kvstore import protocol as say
from kvferry.kvstore.peering import Accepted, Call, Challenge, Fetch, Identity, Proof, Sending
from kvferry.kvstore.sending import MAX_TOLD

ME = Identity("kvferry", "127.0.0.1:1", bytes(16), b"the secret of all stores")
NAME, PARENT = b"n" * 32, b"p" * 32
MIB = 2**20
SILENT = 1000
OURS = 2  # connections to the index: a client's, and the one by which the node itself brings blocks

HELLO = say.encode(say.Hello(say.VERSION, "fuzz", 65536))
OBSERVER = say.encode(say.Hello(say.VERSION, "fuzz", 0))
REQUESTS = [
    say.Lookup(1, Span((NAME,), 0, PARENT, NAME)),
    say.Reserve(2, Span((NAME,), 0, PARENT, NAME), "t"),
    say.Grant(3, 1, (NAME,)),
    say.Commit(4, 1, (say.Written(NAME, PARENT, 1, b"", b"c" * 16),)),
    say.Abort(5, (0,)),
    say.Release(6, 1),
    say.Renew(7),
    say.Quarantine(8, NAME, 0),
    say.Erase(9, "nobody"),
    say.Stats(10),
]
CALLS = [Call(1, "kvferry", purpose, "127.0.0.1:1", bytes(32)) for purpose in ("ask", "fetch")]
FETCH = peering.frame(Fetch((NAME,), 65536))


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def spoilt(frames: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A frame cut short, with a bit flipped, with another length, or noise."""

    def change(frame: bytes, how: str, at: int, noise: bytes) -> bytes:
        at %= len(frame)
        match how:
            case "cut":
                return frame[:at]
            case "flipped":
                return frame[:at] + bytes([frame[at] ^ 1 << len(noise) % 8]) + frame[at + 1 :]
            case "longer":
                return struct.pack("<I", len(frame) - 4 + at) + frame[4:]
            case "over":
                return struct.pack("<I", say.MAX_FRAME_BYTES + 1 + at) + frame[4:]
            case "inside":
                return framed(frame[4 : 4 + at] + noise)
        return noise

    kinds = st.sampled_from(["cut", "flipped", "longer", "over", "inside", "noise"])
    return st.builds(change, frames, kinds, st.integers(0, 10**6), st.binary(max_size=200))


TO_THE_SOCKET = st.tuples(
    st.sampled_from([b"", HELLO, OBSERVER]),
    st.lists(st.sampled_from(REQUESTS).map(say.encode), max_size=3).map(b"".join),
    spoilt(st.sampled_from([HELLO, OBSERVER, *map(say.encode, REQUESTS)])),
)
TO_THE_PORT = st.tuples(
    st.sampled_from([None, "ask", "fetch"]),
    spoilt(st.sampled_from([*map(peering.frame, CALLS), FETCH, *map(say.encode, REQUESTS)])),
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@pytest.fixture
def node(ground, capfd):
    """One that others reach, used before and after: it has three blocks, nothing else happened to it, and nothing that
    it was sent surprised it."""
    node = ground.peer()
    names = ground.names("a", 3)

    async def before():
        async with clients_of(ground, node) as (client,):
            assert await publish(ground, client, names) == 3

    async def after():
        async with clients_of(ground, node) as (client,):
            assert await pulled(ground, client, names) == 3

            async def alone() -> bool:
                return (await client.stats()).connections == OURS

            await ground.until(alone)
            await nothing_held(ground, client)
            stats = await client.stats()
            assert (stats.committed, stats.bad_blocks, stats.quarantined) == (3, 0, 0)

    run(before())
    fds = node.open_fds()
    yield node
    run(after())
    wait_for(lambda: node.open_fds() <= fds)
    assert node.terminate() == 0
    told = capfd.readouterr().err
    assert "store of" in told, "what it says is heard"
    assert "Traceback" not in told, told
    assert told.count("refused a store") <= MAX_TOLD, "strangers do not fill its log"


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def at_port(node) -> socket.socket:
    host, _, port = node.listen.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def at_socket(node) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(node.socket))  # with a timeout it would not wait where many wait to be accepted
    peer.settimeout(10)
    return peer


def poke(peer: socket.socket, data: bytes) -> None:
    """Send, close our half, read until the other side has closed too, which it must."""
    with peer:
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass
        except TimeoutError:
            raise
        except OSError:  # it is closed already
            return


def meet(node, purpose: str) -> socket.socket:
    """Be accepted."""

    async def called(peer: socket.socket) -> None:
        peer.setblocking(False)
        await peering.call(peer, ME, purpose)

    peer = at_port(node)
    asyncio.run(called(peer))
    peer.settimeout(10)
    return peer


def test_frames_at_the_socket(node):
    @FUZZ
    @given(TO_THE_SOCKET)
    def fuzz(parts):
        poke(at_socket(node), b"".join(parts))

    fuzz()


def test_frames_at_the_port(node):
    @FUZZ
    @given(TO_THE_PORT)
    def fuzz(parts):
        purpose, data = parts
        poke(meet(node, purpose) if purpose else at_port(node), data)

    fuzz()


STRANGE = {
    "4 GiB": b"\xff\xff\xff\xff",
    "a long call": struct.pack("<I", peering.MAX_GREETING_BYTES + 1),
    "a long proof": peering.frame(CALLS[0]) + struct.pack("<I", peering.MAX_GREETING_BYTES + 1),
    "nested": framed(b"\x93" * 4000),
    "blocks": peering.frame(Sending(())),
    "accepted": peering.frame(Accepted()),
    "a wrong proof": peering.frame(CALLS[0]) + peering.frame(Proof(bytes(32))),
}


def test_what_a_stranger_says_is_short_and_right_or_the_end(node):
    for what, data in STRANGE.items():
        begun = time.monotonic()
        with at_port(node) as peer:
            peer.sendall(data)
            assert closed(peer)  # it may refuse in words
        assert time.monotonic() - begun < 1.5, f"{what}: it need not wait for the rest"


def test_what_is_announced_is_not_allocated(node):
    """Each of 200 connections says that the most that is allowed follows, and sends none of it. A hello may be no
    longer than that of a correct client."""
    before = node.memory()
    most = struct.pack("<I", say.MAX_FRAME_BYTES)
    held = [meet(node, "fetch") for _ in range(20)] + [meet(node, "ask") for _ in range(20)]
    held += [at_socket(node) for _ in range(80)] + [at_socket(node) for _ in range(80)]
    try:
        for i, peer in enumerate(held):
            peer.sendall((OBSERVER if 40 <= i < 120 else b"") + most + b"\x81")
        for peer in held[120:]:
            assert closed(peer)
        grown = []
        for _ in range(5):
            time.sleep(0.1)
            grown.append(node.memory() - before)
        print(f"grown by {max(grown) / MIB:.1f} MiB; announced were {len(held) * say.MAX_FRAME_BYTES / MIB:.0f}")
        assert max(grown) < 12 * MIB
    finally:
        for peer in held:
            peer.close()


def closed(peer: socket.socket) -> bool:
    """Whether the other side closes, with or without a word."""
    try:
        while peer.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return True


@pytest.mark.parametrize("connect", [at_port, at_socket])
def test_a_thousand_that_say_nothing_are_in_nobodys_way(ground, node, connect):
    """Workers of this host and other stores come and are served. In time the silent ones are let go."""

    async def story():
        other = ground.peer()
        before, held, begun = node.memory(), [], time.monotonic()
        async with clients_of(ground, other) as (far,):
            for i in range(1, SILENT + 1):
                held.append(await asyncio.to_thread(connect, node))
                if i % (SILENT // 4) == 0:
                    async with clients_of(ground, node) as (near,):
                        await ground.until(lambda near=near: near.connected)  # its turn among those who wait
                        names = ground.names(f"meanwhile{i}", 2)
                        assert await publish(ground, near, names, tenant="other") == 2
                        assert await pulled(ground, far, names, holder=node.address, within_s=2) == 2
                        await near.erase("other")
            grown = node.memory() - before
            print(f"{SILENT} connections in {time.monotonic() - begun:.1f} s; {grown / MIB:.1f} MiB more")
            assert grown < 12 * MIB
        for peer in held:
            with peer:
                assert await asyncio.to_thread(closed, peer), "it does not wait for ever"
        assert time.monotonic() - begun < 15
        assert other.terminate() == 0

    run(story())


def test_who_is_refused_a_challenge_is_still_answered_in_words():
    """The longest that either side says before it is accepted fits what the other takes."""
    long = "x" * 300
    call = Call(1, "c" * 64, "fetch", long, bytes(32))
    challenge = Challenge(1, "c" * 64, long, bytes(16), bytes(32), bytes(32))
    refused = say.Refused(peering.difference(call, 2, "d" * 64), incompatible=True)
    assert max(len(peering.frame(one)) for one in (call, challenge, refused)) < peering.MAX_GREETING_BYTES
    assert len(say.encode(say.Hello(1, "r" * 64, 2**39))) < say.MAX_HELLO_BYTES
