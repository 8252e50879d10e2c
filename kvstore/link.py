"""One connection to a store node: the hello, the mapped arena, and requests that do not wait for one another.

A link lives once. When it breaks, every request on it fails with `Unreachable` and the next link starts with nothing.
"""

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvferry.common.errors import IncompatibleNode
from kvferry.kvstore import protocol as say
from kvferry.kvstore.arena import ArenaMap
from kvferry.kvstore.protocol import ProtocolError

log = logging.getLogger(__name__)

HELLO_S = 5.0
CLOSED = "closed"  # why it ended, where we have ended it
REPLY_S = 5.0  # a node that takes longer is treated as gone

R = TypeVar("R", bound=say.Reply)


class Unreachable(Exception):
    """The store is not there, or not there any more. Never leaves this room."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request on its way. `reply` is cancelled with the caller."""

    reply: asyncio.Future[say.Reply]
    expect: type[say.Reply]
    if_abandoned: Callable | None

    def give_back(self, reply: say.Reply) -> None:
        """Nobody is there any more to take what came."""
        if self.if_abandoned is not None and isinstance(reply, self.expect):
            self.if_abandoned(reply)


class Link:
    """`arena` is None for an observer. `lost` is set once the connection is gone, for whatever reason."""

    def __init__(
        self,
        welcome: say.Welcome,
        arena: ArenaMap | None,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        to: str = "the store",
    ):
        self._to = to
        self.welcome = welcome
        self.arena = arena
        self.lost = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}  # whose reply has not come
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, path: Path, role: str, block_bytes: int) -> "Link":
        """Connect and say hello. Raises Unreachable, or IncompatibleNode when the node will not have us."""
        peer = socket.socket(socket.AF_UNIX)
        peer.setblocking(False)
        fd = None
        arena = None
        try:
            async with asyncio.timeout(HELLO_S):
                await asyncio.get_running_loop().sock_connect(peer, str(path))
                welcome, fd = await greet(peer, say.Hello(say.VERSION, role, block_bytes))
            if block_bytes:
                if fd is None or welcome.block_bytes != block_bytes:
                    raise ProtocolError("the node's welcome brings no arena for our blocks")
                arena = ArenaMap(fd, welcome.slots, welcome.block_bytes, welcome.slot_stride)
            reader, writer = await asyncio.open_unix_connection(sock=peer)
        except BaseException as error:
            peer.close()
            if arena is not None:
                arena.retire()
            if isinstance(error, (OSError, EOFError, ProtocolError)):  # TimeoutError is an OSError
                raise Unreachable(f"{path}: {error}") from error
            raise
        finally:
            if fd is not None:
                os.close(fd)
        return cls(welcome, arena, reader, writer)

    @classmethod
    async def over(cls, peer: socket.socket, address: str, boot_id: bytes) -> "Link":
        """To another host's node, at `address`, that has accepted us on this socket, which the link owns from here on:
        it may be asked what an observer may ask."""
        try:
            reader, writer = await asyncio.open_connection(sock=peer)
        except BaseException:
            peer.close()
            raise
        return cls(say.Welcome(boot_id, 0, 0, 0, 0.0), None, reader, writer, f"the store at {address}")

    async def request(
        self, message: say.Request, expect: type[R], timeout_s: float, if_abandoned: Callable[[R], None] | None = None
    ) -> R:
        """The reply to `message`, which carries an id from `next_id`. Raises Unreachable.

        No reply in time breaks the link (a node that hangs is a node that is gone), and so does a reply of another
        type than `expect`. If the caller is cancelled, the reply goes to `if_abandoned`, which gives back what it
        brought.
        """
        if self.lost.is_set():
            raise Unreachable("the connection is gone")
        asked = self._asked[message.id] = _Asked(asyncio.get_running_loop().create_future(), expect, if_abandoned)
        self._write(message)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await asked.reply
            if not isinstance(answer, expect):
                self.drop(f"a {type(message).__name__.lower()} was answered by a {type(answer).__name__.lower()}")
                raise Unreachable("the store does not make sense")
            return answer
        except TimeoutError:
            self.drop(f"no answer to a {type(message).__name__.lower()} within {timeout_s:.1f} s")
            raise Unreachable("the store does not answer") from None
        except asyncio.CancelledError:
            if not asked.reply.cancelled() and not self.lost.is_set():  # the reply had come
                asked.give_back(asked.reply.result())
            raise

    def post(self, message: say.Request) -> None:
        """Send a message whose reply nobody needs."""
        if not self.lost.is_set():
            self._write(message)

    def next_id(self) -> int:
        return next(self._ids)

    def drop(self, reason: str) -> None:
        """Give the connection up: fail what is pending, close the socket, unmap the arena when no copy uses it."""
        if self.lost.is_set():
            return
        self.lost.set()
        ours = reason == CLOSED
        log.log(logging.INFO if ours else logging.WARNING, "the connection to %s ended: %s", self._to, reason)
        for asked in self._asked.values():
            if not asked.reply.done():
                asked.reply.set_exception(Unreachable(reason))
        self._asked.clear()
        self._writer.transport.abort()
        if self.arena is not None:
            self.arena.retire()

    async def close(self) -> None:
        """Drop the connection and wait for the reader to end."""
        self.drop(CLOSED)
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    def _write(self, message: say.Request) -> None:
        # No drain: what is in flight is bounded by our own requests, each of which waits for its reply.
        self._writer.write(say.encode(message))

    async def _read(self) -> None:
        try:
            while True:
                reply = say.decode("reply", await say.read_frame(self._reader))
                if isinstance(reply, say.Refused):
                    reason = say.words(reply.reason)
                    log.error("%s refused us: %s", self._to, reason)
                    return self.drop(reason)
                asked = self._asked.pop(reply.id, None)
                if asked is None:  # it was only posted
                    continue
                if asked.reply.done():  # cancelled, whether or not the caller has run since
                    asked.give_back(reply)
                else:
                    asked.reply.set_result(reply)
        except EOFError:
            self.drop("it was closed" + ("; until the store is back, everything is computed" if self.arena else ""))
        except (ProtocolError, OSError) as error:
            self.drop(repr(error))
        finally:
            self.drop("the reader ended")


async def beat(link: Link) -> None:
    """Keep the connection's leases alive until it is lost."""
    while not link.lost.is_set():
        try:
            async with asyncio.timeout(link.welcome.lease_s / 3):
                await link.lost.wait()
        except TimeoutError:
            try:
                await link.request(say.Renew(link.next_id()), say.Done, REPLY_S)
            except Unreachable:
                return


def post_release(link: Link, lease: int) -> None:
    if lease:
        link.post(say.Release(link.next_id(), lease))


def post_abort(link: Link, slots: Iterable[int | None]) -> None:
    if slots := tuple([slot for slot in slots if slot is not None]):
        link.post(say.Abort(link.next_id(), slots))


async def greet(peer: socket.socket, hello: say.Hello) -> tuple[say.Welcome, int | None]:
    """Say hello on a fresh socket; the welcome, and the arena's fd (the caller's to close) if one came.

    Raises IncompatibleNode with the node's words, OSError, EOFError or ProtocolError.
    """
    await asyncio.get_running_loop().sock_sendall(peer, say.encode(hello))
    header, fds = await receive(peer, say.LENGTH.size, fds=1)
    try:
        body, _ = await receive(peer, say.body_length(header))
        greeting = say.decode("greeting", body)
        if isinstance(greeting, say.Refused):
            raise (IncompatibleNode if greeting.incompatible else ProtocolError)(say.words(greeting.reason))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return greeting, fds[0] if fds else None


async def receive(peer: socket.socket, size: int, fds: int = 0) -> tuple[bytes, list[int]]:
    """Exactly `size` bytes from a non-blocking socket and the file descriptors that come with them (at most `fds`)."""
    data = bytearray()
    got: list[int] = []
    try:
        while len(data) < size:
            await readable(peer)
            piece, more, _, _ = socket.recv_fds(peer, size - len(data), fds, socket.MSG_CMSG_CLOEXEC)
            got += more
            if not piece:
                raise EOFError("the store closed the connection")
            data += piece
    except BaseException:
        for fd in got:
            os.close(fd)
        raise
    return bytes(data), got


async def readable(peer: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(peer, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(peer)
