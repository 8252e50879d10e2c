"""What is said between a store node and its clients: one message a frame, a frame is its length (u32 little-endian)
and that many bytes of msgpack.

Nothing here is peculiar to unix sockets; there, and only there, the arena's file descriptor travels beside `Welcome`.
Every bound is checked before anything of that size is allocated.
"""

import asyncio
import struct
from enum import Enum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvferry.common.block import MAX_SEGMENTS, PROOF_BYTES
from kvferry.common.errors import KvferryError
from kvferry.common.hashing import MAX_SPAN, Name, Span
from kvferry.common.store_api import Claim, Match, Reservation, StoreStats

VERSION = 1
MAX_FRAME_BYTES = 16 * 2**20  # holds a full answer to a look-up of MAX_NAMES names
MAX_HELLO_BYTES = 1024
MAX_NAMES = MAX_SPAN
MAX_WAIT_S = 600.0
LENGTH = struct.Struct("<I")
SALT_BYTES = 16

Names = Annotated[tuple[Name, ...], Meta(max_length=MAX_NAMES)]
Slot = Annotated[int, Meta(ge=0, lt=2**32)]
Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]  # a request's id, or a lease
Pseudonym = Annotated[str, Meta(max_length=64)]
Salt = Annotated[bytes, Meta(max_length=SALT_BYTES)]  # none, or all of it
Proofs = Annotated[bytes, Meta(min_length=PROOF_BYTES, max_length=MAX_SEGMENTS * PROOF_BYTES)]


class ProtocolError(KvferryError):
    """The peer sent what no correct peer sends. The connection is closed; nobody else is harmed."""


class CommitOutcome(str, Enum):
    COMMITTED = "committed"
    PRESENT = "present"  # somebody was first; our copy is dropped
    LATE = "late"  # the reservation had lapsed or was released; our copy is dropped


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first frame of a connection. `block_bytes` 0 is an observer: it may only peek, and gets no arena."""

    version: int
    role: Annotated[str, Meta(max_length=64)]
    block_bytes: Annotated[int, Meta(ge=0, lt=2**40)]


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The answer to `Hello`. An arena that no worker has divided yet has no slots and block_bytes 0.

    `address`: where other hosts' nodes reach this one; empty where they cannot. `sealed`: it takes no plain blocks,
    since they could leave the host.
    """

    boot_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    slots: int
    block_bytes: int
    slot_stride: int
    lease_s: float
    address: Annotated[str, Meta(max_length=300)] = ""
    sealed: bool = False


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Said before the node closes a connection. `incompatible`: trying again is of no use until a process changes."""

    reason: str
    incompatible: bool = False


class Lookup(msgspec.Struct, frozen=True, tag="lookup"):
    """`holder` is another node's address, or nothing. `again`: it goes on with what an earlier one found to be coming;
    it is not counted anew."""

    id: Number
    span: Span
    tenant: Pseudonym = ""
    holder: Annotated[str, Meta(max_length=300)] = ""
    wait_s: Annotated[float, Meta(ge=0, le=MAX_WAIT_S)] = 0.0
    lease: bool = True
    again: bool = False


class Reserve(msgspec.Struct, frozen=True, tag="reserve"):
    id: Number
    span: Span
    tenant: Pseudonym


class Grant(msgspec.Struct, frozen=True, tag="grant"):
    """Ask for slots for names reserved under `lease`."""

    id: Number
    lease: Number
    names: Names


class Written(msgspec.Struct, frozen=True, array_like=True):
    """One granted slot that holds its block now."""

    name: Name
    parent: Name
    slot: Slot
    salt: Salt
    proofs: Proofs


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    id: Number
    lease: Number
    blocks: Annotated[tuple[Written, ...], Meta(max_length=MAX_NAMES)]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Give granted slots back unwritten; the sender no longer writes to them."""

    id: Number
    slots: Annotated[tuple[Slot, ...], Meta(max_length=MAX_NAMES)]


class Release(msgspec.Struct, frozen=True, tag="release"):
    id: Number
    lease: Number


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """A heartbeat; every other message is one too."""

    id: Number


class Quarantine(msgspec.Struct, frozen=True, tag="quarantine"):
    """The bytes of `name` in `slot` do not match their proofs."""

    id: Number
    name: Name
    slot: Slot


class Erase(msgspec.Struct, frozen=True, tag="erase"):
    """Drop all blocks of a tenant."""

    id: Number
    tenant: Pseudonym


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    id: Number


class Matched(msgspec.Struct, frozen=True, tag="matched"):
    id: int
    match: Match


class Reserved(msgspec.Struct, frozen=True, tag="reserved"):
    id: int
    reservation: Reservation


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    """For each name asked for: GRANTED with its slot, PRESENT, or REFUSED (no slot; then so are all that follow)."""

    id: int
    claims: tuple[Claim, ...]
    slots: tuple[int | None, ...]


class Committed(msgspec.Struct, frozen=True, tag="committed"):
    id: int
    outcomes: tuple[CommitOutcome, ...]


class Released(msgspec.Struct, frozen=True, tag="released"):
    """`held`: whether the lease had held until now."""

    id: int
    held: bool


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The answer to what needs none: `Renew`, `Abort`, `Quarantine`, `Erase`."""

    id: int


class Counted(msgspec.Struct, frozen=True, tag="counted"):
    id: int
    stats: StoreStats


Request = Lookup | Reserve | Grant | Commit | Abort | Release | Renew | Quarantine | Erase | Stats
Reply = Matched | Reserved | Granted | Committed | Released | Done | Counted | Refused
Message = Hello | Welcome | Request | Reply
Kind = Literal["hello", "greeting", "request", "reply"]

MAX_WORDS = 300  # characters of what somebody else says that are logged

# What a decoder raises at bytes that somebody made up.
BAD_BODY = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)

_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[Kind, msgspec.msgpack.Decoder] = {
    "hello": msgspec.msgpack.Decoder(Hello),
    "greeting": msgspec.msgpack.Decoder(Welcome | Refused),
    "request": msgspec.msgpack.Decoder(Request),
    "reply": msgspec.msgpack.Decoder(Reply),
}


def encode(message: Message) -> bytes:
    """A whole frame."""
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes does not fit a frame")
    return LENGTH.pack(len(body)) + body


def body_length(header: bytes, most: int = MAX_FRAME_BYTES) -> int:
    """The length that a frame's first four bytes announce. Raises ProtocolError over the bound."""
    (length,) = LENGTH.unpack(header)
    if length > most:
        raise ProtocolError(f"a frame of {length} bytes is announced; {most} is the most")
    return length


def decode(kind: Kind, body: bytes) -> Message:
    """The message of a frame, which must be of that kind. Raises ProtocolError with what is wrong."""
    try:
        return _DECODERS[kind].decode(body)
    except BAD_BODY as error:
        raise ProtocolError(f"not a valid {kind}: {words(str(error))}") from None


def words(said: str) -> str:
    """What somebody else said, fit for a log: it makes no lines of its own, and is no longer than MAX_WORDS."""
    return "".join([c if c.isprintable() else "?" for c in said[:MAX_WORDS]])


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame's body. Raises ProtocolError, IncompleteReadError or OSError."""
    return await reader.readexactly(body_length(await reader.readexactly(LENGTH.size)))
