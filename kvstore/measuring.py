"""What `kvferry doctor` learns of stores over TCP: who they are, and how fast the link between any two of them is."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

import msgspec

from kvferry.common.clock import WallClock
from kvferry.common.errors import IncompatibleNode
from kvferry.kvstore import peering
from kvferry.kvstore.peering import MAX_GREETING_BYTES, Identity, Met, Probe, Probed
from kvferry.kvstore.peers import CONNECT_S, connect
from kvferry.kvstore.protocol import ProtocolError

MEASURE_S = 1.0  # zeros are taken in for so long, or until all have come
PIECE = 2**20
FAULTS = (OSError, EOFError, ProtocolError, IncompatibleNode, ValueError)  # TimeoutError is an OSError


async def serve(peer: socket.socket, me: Identity, block_bytes: int) -> None:
    """Answer a connection to measure, until it closes. Raises ProtocolError, EOFError, OSError."""
    loop, zeros = asyncio.get_running_loop(), memoryview(bytes(PIECE))
    while True:
        probe = await peering.hear(peer, Probe, MAX_GREETING_BYTES)
        told = Probed(WallClock().now(), version("kvferry"), block_bytes)
        if probe.of:
            told = msgspec.structs.replace(told, **await measured(me, probe.of, probe.size))
        await loop.sock_sendall(peer, peering.frame(told))
        for start in range(0, 0 if probe.of else probe.size, PIECE):
            await loop.sock_sendall(peer, zeros[: probe.size - start])


@asynccontextmanager
async def connection(me: Identity, address: str) -> AsyncIterator[tuple[socket.socket, Met]]:
    """A connection to measure by, and who answers. Raises one of FAULTS."""
    peer = None
    try:
        async with asyncio.timeout(CONNECT_S):
            peer = await connect(address)
            met = await peering.call(peer, me, "measure")
        yield peer, met
    finally:
        if peer is not None:
            peer.close()


async def ask(peer: socket.socket, probe: Probe, patience_s: float) -> tuple[Probed, float]:
    """The answer, less the zeros, and the seconds until it was there. Raises one of FAULTS."""
    began = time.monotonic()
    async with asyncio.timeout(patience_s):
        await asyncio.get_running_loop().sock_sendall(peer, peering.frame(probe))
        told = await peering.hear(peer, Probed, MAX_GREETING_BYTES)
    return told, time.monotonic() - began


async def measured(me: Identity, address: str, size: int) -> dict[str, float | str]:
    """What we say of the link from the node at `address` to us, by one connection."""
    try:
        async with connection(me, address) as (peer, _):
            _, round_trip_s = await ask(peer, Probe(0), CONNECT_S)
            await ask(peer, Probe(size), CONNECT_S)
            return {"round_trip_s": round_trip_s, "bytes_per_s": await _speed(peer, size)}
    except FAULTS as error:
        return {"problem": reason(error)}


def reason(error: BaseException) -> str:
    """Why a node could not be asked, for a person."""
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_S:g} s"
    if isinstance(error, ValueError):
        return "its address is not HOST:PORT"
    known = isinstance(error, OSError) and error.errno is not None and error.errno > 0  # getaddrinfo's are less
    return os.strerror(error.errno) if known else str(error) or type(error).__name__


async def _speed(peer: socket.socket, size: int) -> float:
    """Bytes a second, of those that come until all are here or the time is over."""
    loop, room = asyncio.get_running_loop(), bytearray(PIECE)
    got, began = 0, time.monotonic()
    with suppress(TimeoutError):  # what has come by then says how fast it is
        async with asyncio.timeout(MEASURE_S):
            while got < size:
                if not (more := await loop.sock_recv_into(peer, memoryview(room)[: size - got])):
                    raise EOFError("the connection closed while its speed was measured")
                got += more
    return got / max(time.monotonic() - began, 1e-9)
