"""The connections from this node to others: one to ask, and a few to fetch, each. Who does not answer is left alone for
a while, and said so once."""

import asyncio
import logging
import select
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from queue import SimpleQueue

from kvferry.common.clock import Clock
from kvferry.common.errors import IncompatibleNode
from kvferry.kvstore import peering
from kvferry.kvstore.link import Link, Unreachable, readable
from kvferry.kvstore.peering import Fetch, Identity, Met, Purpose, Sending, Sent
from kvferry.kvstore.protocol import ProtocolError

log = logging.getLogger(__name__)

CONNECT_S = 1.0  # to be connected and accepted
STALL_S = 0.5  # a sender from whom nothing more comes for so long is taken for slow
PATIENCE_S = 2.0  # for the first byte of blocks, and, in all, for what comes more slowly than it should
AWAY_FIRST_S, AWAY_MOST_S = 0.5, 10.0  # so long a peer that failed is left alone
AWAY_INCOMPATIBLE_S = 30.0
TOLD_S = 60.0  # so long after its last failure a peer counts as away, if nothing has worked since
FORGOTTEN_S = 120.0  # after so long without use; longer than any peer is left alone
IDLE_MOST = 4  # fetch connections kept for each peer
FETCHES_MOST = 32  # at once from each peer
# TimeoutError is an OSError; an address that is none is a ValueError
FAILED = (OSError, EOFError, ProtocolError, IncompatibleNode, ValueError)

Steps = SimpleQueue[list[memoryview]]  # where a thread receives to, some blocks at a time


class Slow(Exception):
    """A peer stopped sending, or sends too slowly to be worth waiting for."""


class Inflow:
    """One connection to fetch by, used for one request at a time."""

    def __init__(self, peer: socket.socket, met: Met):
        self.met = met
        self._peer = peer
        self.used = False

    async def request(self, names: Sequence[bytes], block_bytes: int) -> tuple[Sent, ...]:
        """Ask for blocks; what verifies the leading ones, whose bytes come next. Raises Slow, ProtocolError,
        IncompatibleNode, EOFError, OSError."""
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().sock_sendall(
                    self._peer, peering.frame(Fetch(tuple(names), block_bytes))
                )
                sending = await peering.hear(self._peer, Sending)
        except TimeoutError:
            raise Slow(f"no answer within {CONNECT_S:g} s") from None
        if len(sending.blocks) > len(names):
            raise ProtocolError("more blocks are sent than were asked for")
        return sending.blocks

    async def begun(self) -> None:
        """Until the first byte of the blocks is here; a sender may have others to serve before. Raises Slow."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await readable(self._peer)
        except TimeoutError:
            raise Slow(f"no block began to come within {PATIENCE_S:g} s") from None

    def receive(self, steps: Steps, arrived: Callable[[int], None], least: Callable[[], float]) -> None:
        """Fill the views of each step, in order, until an empty one; `arrived(n)` when the n of a step are full.
        `least`: the bytes a second that should come, now. Runs in a thread. No step that was taken keeps a view,
        however this ends: an error's traceback keeps no part of the arena. Raises Slow, EOFError, OSError."""
        peer, pace, views = self._peer, Pace(least), []
        try:
            peer.setblocking(True)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(STALL_S))
            while views := steps.get():
                count = len(views)
                fill(peer, views, pace)
                arrived(count)
            peer.setblocking(False)
        finally:
            views.clear()

    def has_ended(self) -> bool:
        """Whether there is anything to read while nothing was asked for: its end, or nonsense."""
        poller = select.poll()
        poller.register(self._peer, select.POLLIN)
        return bool(poller.poll(0))

    def interrupt(self) -> None:
        """Have a thread that receives end, and the connection with it."""
        peering.interrupt(self._peer)

    def close(self) -> None:
        self._peer.close()


def timeval(seconds: float) -> bytes:
    """A `struct timeval` for SO_RCVTIMEO and SO_SNDTIMEO."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))


class Pace:
    """How long a sender is still waited for: what comes is worth the time that it may take."""

    def __init__(self, least: Callable[[], float]):
        self._least = least
        self._left = PATIENCE_S

    def came(self, size: int, seconds: float) -> None:
        """`size` bytes were waited for that long."""
        self._left = min(PATIENCE_S, self._left - seconds + size / self._least())

    def is_over(self) -> bool:
        return self._left < 0


def fill(peer: socket.socket, views: list[memoryview], pace: Pace) -> None:
    """Receive exactly into `views`, and remove them. Raises Slow, EOFError, OSError."""
    while views:
        begun = time.monotonic()
        try:
            got = peer.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            raise Slow(f"nothing came for {STALL_S:g} s") from None
        pace.came(got, time.monotonic() - begun)
        if not got:
            raise EOFError("the connection closed in the middle of a block")
        while views and got >= len(views[0]):
            got -= len(views.pop(0))
        if got:
            views[0] = views[0][got:]
        if views and pace.is_over():
            raise Slow("it sends too slowly to wait for")


class Peer:
    """Another node, by its address. `away_until`: it is not tried before."""

    def __init__(self, address: str):
        self.address = address
        self.boot_id = b""  # when it was last met
        self.away_until = 0.0
        self.asking: Link | None = None
        self.opening = asyncio.Lock()
        self.idle: list[Inflow] = []
        self.turns = asyncio.Semaphore(FETCHES_MOST)
        self.fetching = 0  # now, or waiting for their turn
        self.used = 0.0  # when it was last of interest
        self._pause = AWAY_FIRST_S
        self._failed_at = 0.0
        self._told = ""

    def is_away(self, now: float) -> bool:
        """Whether it failed when it was last spoken to, not long ago."""
        return bool(self._told) and now - self._failed_at < TOLD_S

    def failed(self, error: BaseException, now: float) -> None:
        """Leave it alone for a while; longer with each time in a row, and longest when no retry can help."""
        incompatible = isinstance(error, IncompatibleNode)
        self._failed_at = now
        self.away_until = now + (AWAY_INCOMPATIBLE_S if incompatible else self._pause)
        self._pause = min(2 * self._pause, AWAY_MOST_S)
        while self.idle:
            self.idle.pop().close()
        reason = str(error) or type(error).__name__
        if reason != self._told:
            self._told = reason
            log.log(logging.ERROR if incompatible else logging.WARNING, "the store at %s: %s", self.address, reason)

    def close_ended(self) -> None:
        """Close what the other side has closed: on a connection that nobody uses nothing can come."""
        ended = [inflow for inflow in self.idle if inflow.has_ended()]
        self.idle = [inflow for inflow in self.idle if inflow not in ended]
        for inflow in ended:
            inflow.close()
        if self.asking is not None and self.asking.lost.is_set():
            self.asking = None

    def is_idle(self) -> bool:
        """Whether nothing is open or under way."""
        return not (self.idle or self.asking or self.fetching or self.opening.locked())

    def worked(self) -> None:
        """It did what it was asked for."""
        if self._told:
            log.info("the store at %s is back", self.address)
        self._pause, self._told, self.away_until = AWAY_FIRST_S, "", 0.0


class Peers:
    """All other nodes that this one has heard of. Belongs to the event loop."""

    def __init__(self, me: Identity, clock: Clock):
        self.me = me
        self._clock = clock
        self._peers: dict[str, Peer] = {}

    def usable(self, address: str) -> bool:
        """Whether it is another node, and not known to be away."""
        peer = self._peers.get(address)
        return address != self.me.address and (peer is None or peer.away_until <= self._clock.now())

    @property
    def away(self) -> int:
        """How many of those that were spoken to lately do not work."""
        return sum(peer.is_away(self._clock.now()) for peer in self._peers.values())

    def boot_id(self, address: str) -> bytes:
        """Of the process that was last met there; empty if none was."""
        peer = self._peers.get(address)
        return peer.boot_id if peer is not None else b""

    async def ask(self, address: str) -> Link:
        """A link for messages to a node. Raises Unreachable."""
        peer = self._of(address)
        async with peer.opening:
            if peer.asking is None or peer.asking.lost.is_set():
                sock, met = await self._connect(peer, "ask")
                peer.asking = await Link.over(sock, address, met.boot_id)
                peer.worked()
            return peer.asking

    @asynccontextmanager
    async def turn(self, address: str) -> AsyncIterator[None]:
        """Fetch inside: a store is asked for no more at once than it can send side by side."""
        peer = self._of(address)
        peer.fetching += 1
        try:
            async with peer.turns:
                yield
        finally:
            peer.fetching -= 1

    async def inflow(self, address: str, fresh: bool = False) -> Inflow:
        """A connection to fetch by, which `give_back` or `close` must follow. Raises Unreachable."""
        peer = self._of(address)
        while peer.idle and not fresh:
            inflow = peer.idle.pop()
            if inflow.met.boot_id == peer.boot_id:
                return inflow
            inflow.close()
        return Inflow(*await self._connect(peer, "fetch"))

    def give_back(self, inflow: Inflow, address: str) -> None:
        """It has delivered all that it was asked for, and may be used again."""
        peer, inflow.used = self._of(address), True
        peer.worked()
        if len(peer.idle) < IDLE_MOST:
            peer.idle.append(inflow)
        else:
            inflow.close()

    def failed(self, address: str, error: BaseException) -> None:
        self._of(address).failed(error, self._clock.now())

    async def close(self) -> None:
        for peer in self._peers.values():
            for inflow in peer.idle:
                inflow.close()
            if peer.asking is not None:
                await peer.asking.close()

    def tick(self) -> None:
        """A few times a second: stores that left for good leave nothing behind."""
        now = self._clock.now()
        for peer in list(self._peers.values()):
            peer.close_ended()
            if now - peer.used > FORGOTTEN_S and peer.is_idle():
                del self._peers[peer.address]

    def _of(self, address: str) -> Peer:
        peer = self._peers.setdefault(address, Peer(address))
        peer.used = self._clock.now()
        return peer

    async def _connect(self, peer: Peer, purpose: Purpose) -> tuple[socket.socket, Met]:
        if not self.usable(peer.address):
            raise Unreachable(f"the store at {peer.address} is left alone for a while")
        sock = None
        try:
            async with asyncio.timeout(CONNECT_S):
                sock = await connect(peer.address)
                met = await peering.call(sock, self.me, purpose)
        except FAILED as error:
            if sock is not None:
                sock.close()
            told = OSError(f"no connection within {CONNECT_S:g} s") if isinstance(error, TimeoutError) else error
            peer.failed(told, self._clock.now())
            raise Unreachable(f"the store at {peer.address}: {told}") from error
        except BaseException:
            if sock is not None:
                sock.close()
            raise
        peer.boot_id = met.boot_id
        return sock, met


async def connect(address: str) -> socket.socket:
    """A connected, non-blocking socket to `host:port`, at the first of the name's addresses where there is an answer;
    each has its share of CONNECT_S. Raises OSError, ValueError."""
    host, _, port = address.rpartition(":")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"{address!r} is not HOST:PORT")
    found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    for family, kind, protocol, _, where in found[:-1]:
        try:
            async with asyncio.timeout(CONNECT_S / len(found)):
                return await connect_to(family, kind, protocol, where)
        except OSError as error:  # TimeoutError is one
            log.debug("%s is not reached at %s: %r", address, where[0], error)
    family, kind, protocol, _, where = found[-1]
    return await connect_to(family, kind, protocol, where)


async def connect_to(family: int, kind: int, protocol: int, where: tuple) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        peering.set_up(sock)
        await asyncio.get_running_loop().sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock
