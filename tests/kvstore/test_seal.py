"""Sealed blocks: what opens them, what does not, and that nothing else on the host shows what is in them."""

import asyncio
import itertools
import json
import os
import socket
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from spans import span

from kvferry.common.block import MAX_SEGMENTS, PROOF_BYTES, segment_checksums
from kvferry.common.hashing import NAME_BYTES
from kvferry.common.store_api import Match, MissReason, Payload
from kvferry.kvstore import seal as sealing
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.seal import SALT_BYTES, Seal, decrypt, encrypt

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "seal.json").read_text())
KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
MARK = bytes.fromhex("6b76206f6620612070726f6d707420616e64206e6f7468696e6720656c736521")

# Test cases 13 to 16 of the specification of GCM that was submitted to NIST: AES-256, nonces of 96 bits.
ZEROS, NIST_KEY = "00" * 32, "feffe9928665731c6d6a8f9467308308" * 2
NIST_PLAIN = (
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
NIST_SEALED = (
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
)
NIST = [
    (ZEROS, "00" * 12, "", "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
    (ZEROS, "00" * 12, "", "00" * 16, "cea7403d4d606b6e074ec5d3baf39d18", "d0d1c8a799996bf0265b98b5d48ab919"),
    (NIST_KEY, "cafebabefacedbaddecaf888", "", NIST_PLAIN, NIST_SEALED, "b094dac5d93471bdec1a502270e3cc6c"),
    (NIST_KEY, "cafebabefacedbaddecaf888", "feedfacedeadbeeffeedfacedeadbeefabaddad2", NIST_PLAIN[:120],
     NIST_SEALED[:120], "76fc6ece0f4e1768cddf8853bb2d551b"),
]  # fmt: skip


def run(story):
    return asyncio.run(asyncio.wait_for(story, 60))


# -- one block, in memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NIST, ids=range(13, 17))
def test_aes_gcm_is_that_of_the_standard(case):
    key, nonce, aad, plain, sealed, tag = (bytes.fromhex(text) for text in case)
    cipher, mode = algorithms.AES256(key), modes.GCM(nonce)
    room = bytearray(len(plain))
    assert (encrypt(cipher, mode, aad, memoryview(plain), memoryview(room)), bytes(room)) == (tag, sealed)
    assert decrypt(cipher, mode, aad, tag, memoryview(sealed), memoryview(room))
    assert room == plain
    assert not decrypt(cipher, mode, aad, flipped(tag, 0), memoryview(sealed), memoryview(room))


@pytest.mark.parametrize("case", VECTORS)
def test_blocks_sealed_by_others_are_opened_and_ours_are_the_same(case, monkeypatch):
    told = {field: bytes.fromhex(text) for field, text in case.items() if isinstance(text, str)}
    expected = {field: bytes.fromhex(text) for field, text in case["expect"].items()}
    name, parent, plain, room = told["name"], told["parent"], told["plain"], bytearray(len(told["plain"]))
    seal = Seal(told["seal_key"])
    assert seal.open(name, parent, told["salt"], expected["tags"], memoryview(expected["sealed"]), memoryview(room))
    assert room == plain
    monkeypatch.setattr(sealing.os, "urandom", lambda size: told["salt"][:size])
    proofs = seal.seal(name, parent, memoryview(plain), memoryview(room), case["segments"])
    assert (proofs, bytes(room)) == ((told["salt"], expected["tags"]), expected["sealed"])


PARTS = {"name": NAME_BYTES, "parent": NAME_BYTES, "salt": SALT_BYTES, "tags": MAX_SEGMENTS * PROOF_BYTES, "data": 4096}
FLIPS = st.sampled_from(list(PARTS)).flatmap(lambda part: st.tuples(st.just(part), st.integers(0, 8 * PARTS[part] - 1)))


@settings(max_examples=500, deadline=None, print_blob=True)
@given(FLIPS)
def test_a_block_with_any_bit_flipped_does_not_open(flip):
    part, bit = flip
    block = {"name": os.urandom(NAME_BYTES), "parent": os.urandom(NAME_BYTES)}
    plain, sealed, room = os.urandom(PARTS["data"]), bytearray(PARTS["data"]), bytearray(PARTS["data"])
    salt, tags = Seal(KEY).seal(**block, data=memoryview(plain), into=memoryview(sealed), segments=MAX_SEGMENTS)
    block |= {"salt": salt, "tags": tags, "data": bytes(sealed)}
    assert opens(block, room)
    assert room == plain
    assert not opens({**block, part: flipped(block[part], bit)}, room)


def test_segments_cannot_be_reordered_repeated_or_cut():
    """Nor a block divided into fewer or more of them, with the tags of all."""
    size = 4096
    plain, sealed = os.urandom(size), bytearray(size)
    salt, tags = Seal(KEY).seal(b"n" * 32, b"p" * 32, memoryview(plain), memoryview(sealed), 4)
    block = {"name": b"n" * 32, "parent": b"p" * 32, "salt": salt, "tags": tags, "data": bytes(sealed)}
    parts = [bytes(sealed[i : i + size // 4]) for i in range(0, size, size // 4)]
    proofs = [tags[i : i + PROOF_BYTES] for i in range(0, len(tags), PROOF_BYTES)]
    assert opens(block, bytearray(size))
    orders = [order for length in range(1, 5) for order in itertools.product(range(4), repeat=length)]
    for order in orders:
        whole = order == (0, 1, 2, 3)
        other = {**block, "data": b"".join(parts[i] for i in order), "tags": b"".join(proofs[i] for i in order)}
        assert opens(other, bytearray(len(other["data"]))) == whole, order
        assert opens({**block, "tags": other["tags"]}, bytearray(size)) == whole, order


def test_no_two_blocks_share_a_key_or_show_that_they_are_equal():
    seal, plain = Seal(KEY), bytes(4096)
    seen = set()
    for _ in range(50):
        sealed = bytearray(len(plain))
        salt, tags = seal.seal(b"n" * 32, b"p" * 32, memoryview(plain), memoryview(sealed), 2)
        seen |= {salt, tags[:PROOF_BYTES], tags[PROOF_BYTES:], bytes(sealed[:2048]), bytes(sealed[2048:])}
    assert len(seen) == 50 * 5


@pytest.mark.parametrize("work", ["seal", "open"])
def test_other_threads_run_while_a_segment_is_sealed_or_opened(work):
    """One of them sees a segment of which the beginning is written and the end is not. While the interpreter's lock is
    held, none can."""
    size, seal, name = 2**25, Seal(KEY), b"n" * 32
    data, sealed = b"\xff" * size, bytearray(size)
    salt, tags = seal.seal(name, name, memoryview(data), memoryview(sealed), 1)

    def seal_or_open(room):
        if work == "seal":
            seal.seal(name, name, memoryview(data), room, 1)
        else:
            seal.open(name, name, salt, tags, memoryview(sealed), room)

    for _ in range(100):
        room = bytearray(size)
        thread = threading.Thread(target=seal_or_open, args=(memoryview(room),))
        thread.start()
        halfway = False
        while thread.is_alive():
            halfway |= any(room[:16]) and not any(room[-16:])
        if halfway:
            return
    raise AssertionError("nobody else ran while a segment was in work")


def opens(block, room) -> bool:
    return Seal(KEY).open(**{**block, "data": memoryview(block["data"])}, into=memoryview(room))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# -- through a store node ---------------------------------------------------------------------------------------------


async def started(ground, node):
    client = ground.client(node)
    await client.start()
    return client


async def published(ground, client, names, key=KEY) -> Match:
    """Publish under a key; a lease on the blocks."""
    reservation = await client.reserve(span(names), tenant="t")
    assert await client.publish(reservation, ground.payloads(names), key) == len(names)
    match = await client.lookup(span(names))
    assert len(match.blocks) == len(names)
    await client.release(reservation.lease)
    return match


def with_blocks(match: Match, *blocks) -> Match:
    """The same lease, as if the node had told of other blocks."""
    return msgspec.structs.replace(match, blocks=tuple(blocks))


def altered(match: Match, number: int, **changes) -> Match:
    blocks = list(match.blocks)
    blocks[number] = msgspec.structs.replace(blocks[number], **changes)
    return with_blocks(match, *blocks)


def arena_of(node) -> Path:
    """The arena as the node's process holds it."""
    fds = Path(f"/proc/{node.process.pid}/fd")
    return next(fd for fd in fds.iterdir() if "kvferry-arena" in os.readlink(fd))


def flip_in_arena(ground, node, slot: int, bit: int) -> None:
    at = slot * ground.block_bytes + bit // 8
    with arena_of(node).open("r+b", buffering=0) as arena:
        byte = os.pread(arena.fileno(), 1, at)
        os.pwrite(arena.fileno(), flipped(byte, bit % 8), at)


def test_what_is_sealed_is_opened(ground):
    async def story():
        node = ground.node()
        writer, reader = await started(ground, node), await started(ground, node)
        names = ground.names("a", 40)
        await published(ground, writer, names)
        match = await reader.lookup(span(names))
        assert all(len(block.salt) == SALT_BYTES for block in match.blocks)
        assert len({block.salt for block in match.blocks}) == len(names)
        room = ground.room(40)
        assert await reader.pull(match, room, KEY) == 40
        sent = ground.payloads(names)
        assert all(np.array_equal(got, block.data) for got, block in zip(room, sent, strict=True))
        assert (reader.bad_blocks, reader.pulled_bytes) == (0, 40 * ground.block_bytes)
        await writer.close()
        await reader.close()

    run(story())


def test_any_bit_flipped_is_a_miss_counted_and_quarantined(ground):
    """In the arena, or in what the node tells of the block."""
    node, labels = ground.node(slots=256), itertools.count()
    bits = {"data": 8 * ground.block_bytes, "salt": 8 * SALT_BYTES, "proofs": 2 * 8 * PROOF_BYTES}
    where = st.sampled_from(list(bits)).flatmap(lambda part: st.tuples(st.just(part), st.integers(0, bits[part] - 1)))

    @settings(max_examples=60, deadline=None, print_blob=True)
    @given(where)
    def flip(at):
        part, bit = at
        runner.run(story(part, bit))

    async def story(part, bit):
        client = await started(ground, node)
        names = ground.names(f"flipped {next(labels)}", 3)
        match, before = await published(ground, client, names), await client.stats()
        bad = match.blocks[1]
        if part == "data":
            flip_in_arena(ground, node, bad.slot, bit)
        else:
            match = altered(match, 1, **{part: flipped(getattr(bad, part), bit)})
        room = ground.room(3)
        assert await client.pull(match, room, KEY) == 1
        assert np.array_equal(room[0], ground.payloads(names)[0].data)
        assert client.bad_blocks == 1
        again = await client.lookup(span(names))
        assert (len(again.blocks), again.miss) == (1, MissReason.PAYLOAD_BAD)
        stats = await client.stats()
        assert stats.bad_blocks == before.bad_blocks + 1
        assert bad.slot not in [block.slot for block in (await published(ground, client, names[1:])).blocks]
        await client.close()

    with asyncio.Runner() as runner:
        flip()


def test_headers_swapped_between_two_blocks_are_a_miss(ground):
    async def story():
        node = ground.node()
        client = await started(ground, node)
        match = await published(ground, client, ground.names("a", 2))
        one, two = match.blocks
        swapped = with_blocks(
            match, msgspec.structs.replace(two, slot=one.slot), msgspec.structs.replace(one, slot=two.slot)
        )
        assert await client.pull(swapped, ground.room(2), KEY) == 0
        stats = await client.stats()
        assert (client.bad_blocks, stats.bad_blocks, stats.quarantined) == (1, 1, 1)
        await client.close()

    run(story())


def test_a_block_opens_only_under_its_name_and_behind_its_parent(ground):
    async def story():
        node = ground.node()
        client = await started(ground, node)
        names = ground.names("a", 2)
        match = await published(ground, client, names)
        assert await client.pull(with_blocks(match, *reversed(match.blocks)), ground.room(2), KEY) == 0
        await client.release(match.lease)
        elsewhere = await client.lookup(span(names, parent=b"another".ljust(32)))
        assert len(elsewhere.blocks) == 2, "a block that is not where its name says is left alone"
        assert await client.pull(elsewhere, ground.room(2), KEY) == 0
        assert client.bad_blocks == 2
        await client.close()

    run(story())


@pytest.mark.parametrize(("sealed_with", "pulled_with"), [(KEY, OTHER_KEY), (KEY, None), (None, KEY)])
def test_other_keys_none_and_one_too_many_open_nothing(ground, sealed_with, pulled_with):
    async def story():
        node = ground.node()
        client = await started(ground, node)
        names = ground.names("a", 3)
        match = await published(ground, client, names, sealed_with)
        assert bool(match.blocks[0].salt) == bool(sealed_with)
        room = ground.room(3)
        assert await client.pull(match, room, pulled_with) == 0
        assert client.bad_blocks == 1
        assert not np.array_equal(room[0], ground.payloads(names)[0].data)
        stats = await client.stats()
        assert (stats.bad_blocks, stats.quarantined, stats.committed) == (1, 1, 2)
        await client.close()

    run(story())


@pytest.mark.parametrize("key", [KEY, None], ids=["sealed", "plain"])
def test_proofs_that_do_not_cover_the_block_are_a_miss(ground, key):
    """None, too few, too many, half ones, and of parts that do not add up to it: no exception, nothing taken."""

    async def story():
        node = ground.node()
        client = await started(ground, node)
        names = ground.names("a", 1)
        match = await published(ground, client, names, key)
        proofs = match.blocks[0].proofs
        all_but_one_byte = segment_checksums(ground.payloads(names)[0].data, 3)
        wrong = [b"", proofs[:PROOF_BYTES], proofs[:-1], proofs + b"\0", proofs + proofs[:PROOF_BYTES], proofs * 50,
                 all_but_one_byte]  # fmt: skip
        for number, other in enumerate(wrong, 1):
            assert await client.pull(altered(match, 0, proofs=other), ground.room(1), key) == 0
            assert client.bad_blocks == number
        await client.close()

    run(story())


def test_a_block_that_is_called_sealed_is_not_taken_for_a_plain_one(ground):
    """Though its checksums are right."""

    async def story():
        node = ground.node()
        client = await started(ground, node)
        match = await published(ground, client, ground.names("a", 1), None)
        assert await client.pull(match, ground.room(1)) == 1
        assert await client.pull(altered(match, 0, salt=bytes(SALT_BYTES)), ground.room(1)) == 0
        await client.close()

    run(story())


# -- what can be seen -------------------------------------------------------------------------------------------------


class Tap:
    """Stands between one client and its node: passes everything on, file descriptors too, and keeps every byte."""

    def __init__(self, path: Path, node: Path):
        self.path, self.seen = path, bytearray()
        self._sockets = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        self._listener, self._node = self._sockets
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._node.connect(str(node))
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        back = threading.Thread(target=self._pass_on, args=(self._node, client))
        back.start()
        self._pass_on(client, self._node)
        back.join()
        client.close()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(source, 2**16, 1)
            if not data:
                return target.shutdown(socket.SHUT_WR)
            self.seen += data
            sent = socket.send_fds(target, [data], fds)
            target.sendall(data[sent:])
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive(), "the connection did not end"
        for each in self._sockets:
            each.close()


@pytest.mark.parametrize("key", [KEY, None], ids=["sealed", "plain"])
def test_nothing_of_a_sealed_block_is_in_the_arena_or_on_the_socket(ground, key):
    """Of a plain one it is in the arena: the search finds what is there."""
    node = ground.node()
    tap = Tap(node.socket.with_suffix(".tap"), node.socket)
    names = ground.names("marked", 4)
    plain = MARK * (ground.block_bytes // len(MARK))

    async def story():
        client = StoreClient(tap.path, ground.block_bytes, 2, "test")
        await client.start()
        payloads = [Payload(name, parent, memoryview(plain))
                    for name, parent in zip(names, [ground.root, *names], strict=False)]  # fmt: skip
        reservation = await client.reserve(span(names), tenant="t")
        assert await client.publish(reservation, payloads, key) == 4
        match, room = await client.lookup(span(names)), ground.room(4)
        assert await client.pull(match, room, key) == 4
        assert all(block == plain for block in room)
        await client.close()

    run(story())
    tap.close()
    arena = arena_of(node).read_bytes()
    marks = [MARK[start : start + 8] for start in range(len(MARK) - 7)]
    assert any(mark in arena for mark in marks) == (key is None)
    assert not any(mark in tap.seen for mark in marks)
    assert all(name in tap.seen for name in names), "the tap hears what is said"
