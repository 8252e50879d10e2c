"""The store node: one process a host, which owns the arena and answers over a unix socket.

Of blocks that stay on the host it moves no bytes; it only says who may read and write which slot. Each connection is a
task of its own. The index is touched by the event loop alone and by one message at a time, so it needs no lock.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable

from kvferry.common.block import slot_stride
from kvferry.common.clock import MonotonicClock
from kvferry.common.config import StoreConfig
from kvferry.common.errors import ConfigError
from kvferry.common.process import Notifier, available_memory, claim_socket_path
from kvferry.kvstore import protocol as say
from kvferry.kvstore.arena import ArenaMap, create_arena
from kvferry.kvstore.conversation import Conversation, Waiters
from kvferry.kvstore.eviction import FairLru
from kvferry.kvstore.index import Index
from kvferry.kvstore.network import Network, accept, check_network, listen_for_peers
from kvferry.kvstore.peering import exactly
from kvferry.kvstore.protocol import ProtocolError

log = logging.getLogger(__name__)

HELLO_S = 5.0  # a connection that has not said hello by then is closed
QUIET_S = 1.0  # so long without a change, and the index checks itself
CHECK_EVERY_S = 5.0  # but not more often than this


async def serve(config: StoreConfig, notifier: Notifier, stop: asyncio.Event) -> None:
    """Run a node until `stop` is set; then close every connection and remove the socket.

    Raises ConfigError when the socket or the memory cannot be had, RuntimeError when the index finds itself damaged.
    """
    claim_socket_path(config.socket, "the store")
    refuse_if_too_large(config)
    check_network(config)
    arena = await create_arena(config.size_bytes, lambda done, total: notifier.progress("prefault", done, total))
    try:
        claim_socket_path(config.socket, "the store")
        listener = listen(config)
        inode = os.stat(config.socket).st_ino
        try:
            outside = listen_for_peers(config.listen) if config.listen else None
            node = Node(config, arena)
            log.info("store of %d bytes at %s", config.size_bytes, config.socket)
            await node.run(listener, stop, outside, notifier.ready)
        finally:
            listener.close()
            remove_socket(config, inode)
    finally:
        os.close(arena)


def refuse_if_too_large(config: StoreConfig) -> None:
    """Raise ConfigError if the memory is not there: the arena is touched whole at the start."""
    if config.size_bytes > (available := available_memory()):
        raise ConfigError(
            f"a store of {config.size_bytes / 2**30:.1f} GiB does not fit into the {available / 2**30:.1f} GiB of "
            "memory that this host has available; give a smaller --size (--store-size of `kvferry serve`)"
        )


def listen(config: StoreConfig) -> socket.socket:
    """A listening socket at the path, for this user alone. Raises ConfigError."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.setblocking(False)
        listener.bind(str(config.socket))
        os.chmod(config.socket, 0o600)  # before listen: nobody can have connected yet
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {config.socket}: {error.strerror}") from error
    return listener


def remove_socket(config: StoreConfig, inode: int) -> None:
    """Remove our socket file; not one that somebody else has put there since."""
    try:
        if os.stat(config.socket).st_ino == inode:
            config.socket.unlink()
    except FileNotFoundError:
        log.warning("the socket %s was removed while the store ran", config.socket)


class Node:
    """One arena, one index, all connections. `arena` is the fd, which stays the caller's."""

    def __init__(self, config: StoreConfig, arena: int):
        self._config = config
        self._arena = arena
        self._boot_id = os.urandom(16)
        self._block_bytes = 0  # fixed by the first worker
        self._slots = 0
        self._clock = MonotonicClock()
        self._index = Index(
            FairLru(),
            self._clock,
            lease_s=config.lease_s,
            writing_per_connection=config.writing_per_connection,
            boot_id=self._boot_id,
        )
        self._waiters = Waiters(self._index)
        self._network: Network | None = None
        self._map: ArenaMap | None = None  # only a node with a network touches blocks
        self._connections: set[asyncio.Task] = set()

    async def run(
        self,
        listener: socket.socket,
        stop: asyncio.Event,
        outside: socket.socket | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Answer until `stop` is set: workers of this host at `listener`, other nodes at `outside`, which is closed at
        the end."""
        tasks = [asyncio.create_task(stop.wait())]
        try:
            if outside is not None:
                self._network = await Network.open(self._config, self._boot_id, self._index, self._waiters)
                tasks.append(asyncio.create_task(self._accept(outside, self._network.sender.serve)))
                log.info("other stores reach it at %s", self._config.address)
            tasks.append(asyncio.create_task(self._accept(listener, self._serve_peer)))
            tasks.append(asyncio.create_task(self._keep_house()))
            tasks.append(asyncio.create_task(self._check_when_quiet()))
            ready()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                log.info("ending")
        finally:
            if outside is not None:
                outside.close()
            for task in (*tasks, *self._connections):
                task.cancel()
            results = await asyncio.gather(*tasks, *self._connections, return_exceptions=True)
            if self._network is not None:
                await self._network.close()
            if self._map is not None:
                self._map.retire()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _accept(self, listener: socket.socket, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        while True:
            task = asyncio.create_task(serve(await accept(listener)))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _keep_house(self) -> None:
        """Let silent connections lapse, and reclaim slots."""
        while True:
            await asyncio.sleep(min(0.25, self._config.lease_s / 4))
            self._index.tick()
            self._waiters.wake()
            if self._network is not None:
                self._network.tick()

    async def _check_when_quiet(self) -> None:
        """Check the index when nothing happens, once after each change."""
        checked = -1
        while True:
            changes = self._index.changes
            await asyncio.sleep(QUIET_S)
            if self._index.changes == changes != checked:
                if await self._check():
                    checked = changes
                await asyncio.sleep(CHECK_EVERY_S)

    async def _check(self) -> bool:
        """Check the index in steps, between which requests are answered. Whether it was checked whole: not if it
        changed."""
        changes = self._index.changes
        try:
            for _ in self._index.checking():
                await asyncio.sleep(0)
                if self._index.changes != changes:
                    return False
        except RuntimeError:
            log.critical("the index is damaged; ending, so that nothing wrong is served", exc_info=True)
            raise
        return True

    # -- one connection ------------------------------------------------------------------------------------------

    async def _serve_peer(self, peer: socket.socket) -> None:
        """One connection from hello to close. Whatever it sends, nobody else is harmed."""
        peer.setblocking(False)
        try:
            async with asyncio.timeout(HELLO_S):
                hello = await self._greet(peer)
            if hello is None:
                peer.close()
                return
            reader, writer = await asyncio.open_unix_connection(sock=peer)  # it owns the socket from here on
        except (ProtocolError, EOFError, OSError) as error:
            peer.close()
            why = f"none came within {HELLO_S:g} s" if isinstance(error, TimeoutError) else error
            log.info("a connection ended before its hello was answered: %s", why)
            return
        except BaseException:
            peer.close()
            raise
        try:
            reach = self._network.reach if self._network is not None else None
            only_sealed = self._config.only_sealed
            await Conversation(self._index, self._waiters, hello, reader, writer, reach, only_sealed).run()
        finally:
            writer.close()

    async def _greet(self, peer: socket.socket) -> say.Hello | None:
        """Answer the hello: with a welcome and the arena, or with a refusal (None)."""
        loop = asyncio.get_running_loop()
        length = say.body_length(await exactly(peer, say.LENGTH.size), say.MAX_HELLO_BYTES)
        hello = say.decode("hello", await exactly(peer, length))
        if problem := self._problem_with(hello):
            log.warning("refused a %s: %s", hello.role or "client", problem)
            await loop.sock_sendall(peer, say.encode(say.Refused(problem, incompatible=True)))
            return None
        if hello.block_bytes and not self._block_bytes:
            self._block_bytes = hello.block_bytes
            self._slots = self._slots_of(hello.block_bytes)
            self._index.divide(self._slots, hello.block_bytes)
            if self._network is not None:
                self._map = ArenaMap(self._arena, self._slots, hello.block_bytes, slot_stride(hello.block_bytes))
                self._network.use(self._map)
            log.info("the arena has %d slots for blocks of %d bytes", self._slots, hello.block_bytes)
        stride = slot_stride(self._block_bytes)
        config = self._config
        welcome = say.encode(
            say.Welcome(
                self._boot_id,
                self._slots,
                self._block_bytes,
                stride,
                config.lease_s,
                config.address,
                config.only_sealed,
            )
        )
        fds = [self._arena] if hello.block_bytes else []
        # A fresh socket's buffer takes a frame this small whole and at once.
        if socket.send_fds(peer, [welcome], fds) != len(welcome):
            raise ProtocolError("the welcome was cut short")
        return hello

    def _slots_of(self, block_bytes: int) -> int:
        return self._config.size_bytes // slot_stride(block_bytes)

    def _problem_with(self, hello: say.Hello) -> str:
        if hello.version != say.VERSION:
            return f"this store speaks protocol version {say.VERSION}, you speak {hello.version}"
        if not hello.block_bytes:
            return ""
        if self._block_bytes and hello.block_bytes != self._block_bytes:
            return (
                f"this node's blocks have {self._block_bytes} bytes, yours {hello.block_bytes}: model, dtype, block "
                "size or layout differ; start another store for them"
            )
        if not self._slots_of(hello.block_bytes):
            return f"a block of {hello.block_bytes} bytes does not fit an arena of {self._config.size_bytes} bytes"
        return ""
