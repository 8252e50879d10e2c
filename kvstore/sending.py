"""The node's side towards other nodes: it accepts those that know the secret, answers what they ask, and sends the
blocks they fetch straight from the arena."""

import asyncio
import logging
import select
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvferry.common.errors import IncompatibleNode
from kvferry.kvstore import measuring, peering
from kvferry.kvstore import protocol as say
from kvferry.kvstore.arena import ArenaMap
from kvferry.kvstore.conversation import Conversation, Waiters
from kvferry.kvstore.index import Index
from kvferry.kvstore.peering import Fetch, Identity, Met, Sending, Sent, interrupt, set_up
from kvferry.kvstore.protocol import ProtocolError

log = logging.getLogger(__name__)

GREETING_S = 2.0
MAX_STRANGERS = 64  # connections that have not proved themselves yet
MAX_TOLD = 64  # different reasons that are remembered
MAX_PEERS = 1024  # connections
SEND_BYTES = 64 * 2**20  # sent in one go
TURN_S = 0.1  # a thread sends to one receiver before others have their turn
SEND_STALL_S = 5.0  # a receiver that takes nothing for so long is given up
MAX_PARTS = 512  # buffers of one sendmsg; the system takes 1024
TOLD_AGAIN_S = 10.0  # a reason for refusing callers is logged once in so long


class Sender:
    """Serves connections from other nodes."""

    def __init__(self, me: Identity, index: Index, waiters: Waiters):
        self._me = me
        self._index = index
        self._waiters = waiters
        self._arena: ArenaMap | None = None
        self._threads = ThreadPoolExecutor(16, thread_name_prefix="kvferry-send")
        self._strangers: dict[socket.socket, None] = {}  # in the order in which they came
        self._peers = 0
        self._told: dict[str, float] = {}
        self._sending: set[socket.socket] = set()

    def use(self, arena: ArenaMap) -> None:
        """The arena is divided."""
        self._arena = arena

    async def serve(self, peer: socket.socket) -> None:
        """One connection, from its first word to its close. Whatever it sends, nobody else is harmed."""
        where = "an address that is gone"
        try:
            where = peer.getpeername()[0]
            set_up(peer)
            met = await self._meet(peer)
            self._peers += 1
            try:
                match met.purpose:
                    case "ask":
                        await self._answer(peer, met)
                    case "fetch":
                        await self._send(peer, met)
                    case "measure":
                        await measuring.serve(peer, self._me, self._arena.block_bytes if self._arena else 0)
            finally:
                self._peers -= 1
        except (ProtocolError, IncompatibleNode) as error:
            self._tell(where, str(error))
        except (EOFError, OSError) as error:  # TimeoutError is an OSError
            log.debug("a connection from %s ended: %r", where, error)
        finally:
            peer.close()

    async def close(self) -> None:
        """End what is being sent; the connections' tasks are cancelled by who started them."""
        for peer in self._sending:
            interrupt(peer)
        await asyncio.to_thread(self._threads.shutdown)

    async def _meet(self, peer: socket.socket) -> Met:
        """Who it is. Of too many strangers the one that has been here longest goes: a store takes no time to greet."""
        if self._peers >= MAX_PEERS:
            raise ProtocolError("too many connections at once; it was closed")
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            interrupt(oldest)
        self._strangers[peer] = None
        try:
            async with asyncio.timeout(GREETING_S):
                return await peering.answer(peer, self._me)
        finally:
            self._strangers.pop(peer, None)

    def _tell(self, where: str, reason: str) -> None:
        """Why a caller was sent away; a reason once in a while, so that nobody can fill the log."""
        now = time.monotonic()
        self._told = {key: until for key, until in self._told.items() if until > now}
        if (key := f"{where} {reason}") not in self._told and len(self._told) < MAX_TOLD:
            self._told[key] = now + TOLD_AGAIN_S
            log.warning("refused a store at %s: %s", where, reason)

    async def _answer(self, peer: socket.socket, met: Met) -> None:
        reader, writer = await asyncio.open_connection(sock=peer.dup())  # which it owns
        try:
            hello = say.Hello(say.VERSION, f"store at {met.address}", 0)
            await Conversation(self._index, self._waiters, hello, reader, writer).run()
        finally:
            writer.close()

    async def _send(self, peer: socket.socket, met: Met) -> None:
        connection = self._index.connect()
        try:
            while True:
                fetch = await peering.hear(peer, Fetch)
                self._index.renew(connection)
                await self._send_blocks(peer, connection, fetch)
        finally:
            self._index.disconnect(connection)
            self._waiters.wake()

    async def _send_blocks(self, peer: socket.socket, connection: int, fetch: Fetch) -> None:
        """Answer one request; the blocks are leased while they are sent."""
        arena = self._arena
        if arena is not None and fetch.block_bytes != arena.block_bytes:
            problem = (
                f"the store that was called has blocks of {arena.block_bytes} bytes, the caller of "
                f"{fetch.block_bytes}: model, dtype, block size or layout differ; such stores cannot be of one cluster"
            )
            await peering.refuse(peer, problem)
        match = self._index.lookup(connection, fetch.names, lease=True, sent=True)
        try:
            headers = tuple([Sent(block.salt, block.proofs) for block in match.blocks])
            await asyncio.get_running_loop().sock_sendall(peer, peering.frame(Sending(headers)))
            step = max(1, SEND_BYTES // fetch.block_bytes)
            for start in range(0, len(match.blocks), step):
                await self._send_slots(peer, connection, [block.slot for block in match.blocks[start : start + step]])
        finally:
            held = not match.lease or self._index.release(connection, match.lease)
        if not held:
            raise ProtocolError("the blocks' lease ended while they were sent; they may be torn")

    async def _send_slots(self, peer: socket.socket, connection: int, slots: Sequence[int]) -> None:
        """A receiver that takes nothing holds no thread."""
        with self._arena.in_use():
            views = [self._arena.slot(slot) for slot in slots]
            try:
                while views:
                    if not await self._in_thread(peer, views):
                        await writable(peer)
                    self._index.renew(connection)
            finally:
                views.clear()  # an error's traceback keeps no part of the arena

    async def _in_thread(self, peer: socket.socket, views: list[memoryview]) -> int:
        self._sending.add(peer)
        sending = asyncio.get_running_loop().run_in_executor(self._threads, send_some, peer, views)
        try:
            return await asyncio.shield(sending)
        except asyncio.CancelledError:
            interrupt(peer)
            await asyncio.gather(sending, return_exceptions=True)
            raise
        finally:
            self._sending.discard(peer)


def send_some(peer: socket.socket, views: list[memoryview]) -> int:
    """Send what is taken of `views` within TURN_S, and remove it; how many bytes that were. Raises OSError."""
    poller = select.poll()
    poller.register(peer, select.POLLOUT)
    until, total = time.monotonic() + TURN_S, 0
    while views and (left := until - time.monotonic()) > 0:
        try:
            sent = peer.sendmsg(views[:MAX_PARTS])
        except BlockingIOError:
            poller.poll(left * 1000)
            continue
        total += sent
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if sent:
            views[0] = views[0][sent:]
    return total


async def writable(peer: socket.socket) -> None:
    """Until it takes more. Raises TimeoutError when it has not for SEND_STALL_S."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(peer, lambda: ready.done() or ready.set_result(None))
    try:
        async with asyncio.timeout(SEND_STALL_S):
            await ready
    except TimeoutError:
        raise TimeoutError(f"nothing was taken for {SEND_STALL_S:g} s") from None
    finally:
        loop.remove_writer(peer)
