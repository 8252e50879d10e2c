"""How two store nodes meet over TCP: who they are, that they know the same secret, and what they say then.

    caller                                   answerer
    Call(version, cluster, address, nonce)
                                             Challenge(version, cluster, address, nonce, proof)
    Proof(proof)
                                             Accepted()

Each side proves the secret by HMAC-SHA256 over everything that both have said, with its side's name in it, so that
neither can be answered with its own words. The frames behind it are not protected: blocks that leave a host are
sealed, so what somebody changes on the way is a miss, and what somebody reads are names, sizes and times.

A connection is for one of three things. One to *ask* carries the messages of a client that may only look (protocol.py).
One to *fetch* carries `Fetch`, answered by `Sending` and then by the bytes of the blocks, one after the other. One to
*measure* carries `Probe`, answered by `Probed` and then by zeros (measuring.py).
"""

import asyncio
import hashlib
import hmac
import os
import socket
from dataclasses import dataclass, field
from typing import Annotated, Literal, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from kvferry.common.errors import IncompatibleNode
from kvferry.common.hashing import length_prefixed
from kvferry.kvstore.protocol import (
    BAD_BODY,
    LENGTH,
    MAX_FRAME_BYTES,
    Name,
    Proofs,
    ProtocolError,
    Refused,
    Salt,
    body_length,
    words,
)

VERSION = 1
NONCE_BYTES = 32
MAX_FETCH = 8192  # blocks in one request
MAX_PROBE = 64 * 2**20  # zeros in one answer
MAX_GREETING_BYTES = 4096  # of a frame from somebody who has proved nothing yet
OTHER_SECRET = "the two stores do not know the same secret (--peer-secret-file)"
KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))  # seconds, and tries

Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Hmac = Annotated[bytes, Meta(min_length=32, max_length=32)]
Address = Annotated[str, Meta(min_length=1, max_length=300)]
BootId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Purpose = Literal["ask", "fetch", "measure"]


class Call(msgspec.Struct, frozen=True, tag="call"):
    version: int
    cluster: Annotated[str, Meta(max_length=64)]
    purpose: Purpose
    address: Address
    nonce: Nonce


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    version: int
    cluster: Annotated[str, Meta(max_length=64)]
    address: Address
    boot_id: BootId
    nonce: Nonce
    proof: Hmac


class Proof(msgspec.Struct, frozen=True, tag="proof"):
    proof: Hmac


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    pass


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Send the leading ones of these blocks that are there. `block_bytes` is the size that the sender takes."""

    names: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MAX_FETCH)]
    block_bytes: Annotated[int, Meta(ge=1, lt=2**40)]


class Sent(msgspec.Struct, frozen=True, array_like=True):
    """What a block is verified by, whose bytes follow."""

    salt: Salt
    proofs: Proofs


class Sending(msgspec.Struct, frozen=True, tag="sending"):
    blocks: Annotated[tuple[Sent, ...], Meta(max_length=MAX_FETCH)]


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Say who you are, and send so many zeros behind it; or, where `of` is another node's address, have that one send
    them to you, and say how it went."""

    size: Annotated[int, Meta(ge=0, le=MAX_PROBE)]
    of: Annotated[str, Meta(max_length=300)] = ""


class Probed(msgspec.Struct, frozen=True, tag="probed"):
    """`clock`: seconds since 1970, there. `release`: kvferry's. `block_bytes`: 0 before the first worker. The rest is
    of another node; `problem` says why there is nothing of it."""

    clock: float
    release: Annotated[str, Meta(max_length=64)]
    block_bytes: int = 0
    round_trip_s: float = 0.0
    bytes_per_s: float = 0.0
    problem: Annotated[str, Meta(max_length=1000)] = ""


Said = TypeVar("Said", Call, Challenge, Proof, Accepted, Fetch, Sending, Probe, Probed)
KINDS = (Call, Challenge, Proof, Accepted, Fetch, Sending, Probe, Probed)
_DECODERS: dict[type, msgspec.msgpack.Decoder] = {kind: msgspec.msgpack.Decoder(kind | Refused) for kind in KINDS}


@dataclass(frozen=True, slots=True)
class Identity:
    """What one node says of itself to others. `secret` is what all nodes of a cluster know."""

    cluster: str
    address: str
    boot_id: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Met:
    """A peer that has proved that it knows the secret."""

    address: str
    purpose: Purpose
    boot_id: bytes = b""  # of the one who answered


def set_up(peer: socket.socket) -> None:
    """Small frames go at once; a host that is gone without a word is noticed."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        peer.setsockopt(socket.IPPROTO_TCP, option, value)


def frame(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


async def hear(peer: socket.socket, kind: type[Said], most: int = MAX_FRAME_BYTES) -> Said:
    """The next frame of a non-blocking socket. Raises IncompatibleNode or ProtocolError with the peer's words when it
    refuses, ProtocolError for what is no such message, EOFError, OSError."""
    length = body_length(await exactly(peer, LENGTH.size), most)
    try:
        message = _DECODERS[kind].decode(await exactly(peer, length))
    except BAD_BODY as error:
        raise ProtocolError(f"not a valid {kind.__name__.lower()}: {words(str(error))}") from None
    if isinstance(message, Refused):
        raise (IncompatibleNode if message.incompatible else ProtocolError)(words(message.reason))
    return message


def interrupt(peer: socket.socket) -> None:
    """Have a thread that sends or receives by a socket end, and the connection with it."""
    try:
        peer.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is not connected any more
        return


async def exactly(peer: socket.socket, size: int) -> bytes:
    """`size` bytes from a non-blocking socket. Raises EOFError, OSError."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < size:
        if not (piece := await loop.sock_recv(peer, size - len(data))):
            raise EOFError(f"the connection closed after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)


async def call(peer: socket.socket, me: Identity, purpose: Purpose) -> Met:
    """Be accepted by who answers at a connected socket. Raises IncompatibleNode, ProtocolError, EOFError, OSError."""
    loop = asyncio.get_running_loop()
    mine = Call(VERSION, me.cluster, purpose, me.address, os.urandom(NONCE_BYTES))
    await loop.sock_sendall(peer, frame(mine))
    theirs = await hear(peer, Challenge, MAX_GREETING_BYTES)
    if problem := difference(mine, theirs.version, theirs.cluster):
        await refuse(peer, problem)
    if not hmac.compare_digest(theirs.proof, proof(me.secret, "answerer", mine, theirs)):
        await refuse(peer, OTHER_SECRET)
    await loop.sock_sendall(peer, frame(Proof(proof(me.secret, "caller", mine, theirs))))
    await hear(peer, Accepted, MAX_GREETING_BYTES)
    return Met(theirs.address, purpose, theirs.boot_id)


async def answer(peer: socket.socket, me: Identity) -> Met:
    """Find out who calls. Raises IncompatibleNode when it is none of ours, which it is told, ProtocolError, EOFError,
    OSError."""
    loop = asyncio.get_running_loop()
    theirs = await hear(peer, Call, MAX_GREETING_BYTES)
    if problem := difference(theirs, VERSION, me.cluster):
        await refuse(peer, problem)
    mine = Challenge(VERSION, me.cluster, me.address, me.boot_id, os.urandom(NONCE_BYTES), bytes(32))
    mine = msgspec.structs.replace(mine, proof=proof(me.secret, "answerer", theirs, mine))
    await loop.sock_sendall(peer, frame(mine))
    told = await hear(peer, Proof, MAX_GREETING_BYTES)
    if not hmac.compare_digest(told.proof, proof(me.secret, "caller", theirs, mine)):
        await refuse(peer, OTHER_SECRET)
    await loop.sock_sendall(peer, frame(Accepted()))
    return Met(theirs.address, theirs.purpose)


async def refuse(peer: socket.socket, reason: str) -> NoReturn:
    """Tell a peer why there is nothing to be had. Raises IncompatibleNode with the same words, which stand in both
    logs."""
    await asyncio.get_running_loop().sock_sendall(peer, frame(Refused(reason, incompatible=True)))
    raise IncompatibleNode(reason)


def difference(call: Call, version: int, cluster: str) -> str:
    """Why a caller and an answerer of that version and cluster do not belong together; empty if they may."""
    if version != call.version:
        return f"the store that was called speaks protocol version {version}, the caller {call.version}"
    if cluster != call.cluster:
        return f"the store that was called is of the cluster {cluster!r}, the caller of {call.cluster!r}"
    return ""


def proof(secret: bytes, side: str, call: Call, challenge: Challenge) -> bytes:
    """HMAC-SHA256 over who speaks and all that was said before."""
    said = length_prefixed(
        "kvferry/peer", side, call.version, call.cluster, call.purpose, call.address, call.nonce,
        challenge.version, challenge.cluster, challenge.address, challenge.boot_id, challenge.nonce,
    )  # fmt: skip
    return hmac.digest(secret, said, hashlib.sha256)
