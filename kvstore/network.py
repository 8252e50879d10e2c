"""A node's place among others: its name and secret, its listener, its directory, what goes to and from its peers."""

import asyncio
import errno
import logging
import socket
from pathlib import Path

from kvferry.common.clock import Clock, MonotonicClock
from kvferry.common.config import StoreConfig
from kvferry.common.errors import ConfigError
from kvferry.kvstore.arena import ArenaMap
from kvferry.kvstore.conversation import Waiters
from kvferry.kvstore.directory import Directory, Holder, LocalDirectory, LocalTable
from kvferry.kvstore.fetching import Fetcher
from kvferry.kvstore.index import Index
from kvferry.kvstore.peering import Identity
from kvferry.kvstore.peers import Peers
from kvferry.kvstore.reach import Reach
from kvferry.kvstore.redis_directory import RedisDirectory
from kvferry.kvstore.redis_target import RedisTarget, parse_redis_url
from kvferry.kvstore.sending import Sender

log = logging.getLogger(__name__)

BACKLOG = 512
LEAST_SECRET = 16  # bytes
OUT_OF_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
GONE_AGAIN = (  # accept(2): what may be told of a connection that ended before it was accepted
    *(errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ENONET),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT),
)


class Network:
    """What a node has besides its own host. `reach` is what its workers' conversations use."""

    def __init__(self, config: StoreConfig, me: Identity, index: Index, waiters: Waiters, directory: Directory):
        clock: Clock = MonotonicClock()
        self._directory = directory
        self._peers = Peers(me, clock)
        self.fetcher = Fetcher(index, waiters.wake, self._peers, config.connections, config.only_sealed)
        self.sender = Sender(me, index, waiters)
        self.reach = Reach(index, directory, self._peers, self.fetcher, clock)
        waiters.on_committed(self.reach.announce)

    @classmethod
    async def open(cls, config: StoreConfig, boot_id: bytes, index: Index, waiters: Waiters) -> "Network":
        """Raises ConfigError."""
        me = Identity(config.cluster, config.address, boot_id, read_secret(config.peer_secret_file))
        holder, clock = Holder(me.address, boot_id), MonotonicClock()
        directory: Directory
        if config.redis is None:
            directory = LocalDirectory(holder, LocalTable(clock))
            log.info("no directory (--redis): blocks are fetched only from where they were just computed")
        else:
            target = redis_target(config)
            directory = await RedisDirectory.open(target, holder, clock)
            if directory.state == "up":
                log.info("directory: %s in use", target)
        return cls(config, me, index, waiters, directory)

    def use(self, arena: ArenaMap) -> None:
        """The arena is divided: there may be blocks to send and to bring."""
        self.fetcher.use(arena)
        self.sender.use(arena)

    def tick(self) -> None:
        """A few times a second."""
        self.fetcher.renew()
        self._peers.tick()
        self.reach.tick()

    async def close(self) -> None:
        await self.fetcher.close()
        await self.sender.close()
        await self.reach.close()
        await self._peers.close()
        await self._directory.close()


def redis_target(config: StoreConfig) -> RedisTarget:
    """Where a node's directory is. Raises ConfigError."""
    return parse_redis_url(
        config.redis, user=config.redis_user, password_file=config.redis_password_file, ca_file=config.redis_ca_file
    )


def read_secret(path: Path) -> bytes:
    """What all stores of a cluster know: the bytes of a file, without the white space around them. Raises
    ConfigError."""
    try:
        others = path.stat().st_mode & 0o077
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"the stores' secret {path} cannot be read: {error.strerror}") from error
    if others:
        raise ConfigError(f"the stores' secret {path} may be read by others; run `chmod 600 {path}`")
    if len(secret) < LEAST_SECRET:
        raise ConfigError(f"the stores' secret {path} has {len(secret)} bytes; it needs {LEAST_SECRET} at least "
                          "(`kvferry certs init` makes one)")  # fmt: skip
    return secret


def listen_for_peers(address: str) -> socket.socket:
    """A listening TCP socket. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address} for other stores: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def check_network(config: StoreConfig) -> None:
    """Raise ConfigError for what is wrong about the files and addresses by which a node meets others."""
    if config.peer_secret_file is not None:
        read_secret(config.peer_secret_file)
    if config.redis is not None:
        redis_target(config)
    if config.listen is not None:
        listen_for_peers(config.listen).close()


async def accept(listener: socket.socket) -> socket.socket:
    """The next connection. Waits out a shortage of descriptors or memory."""
    while True:
        try:
            peer, _ = await asyncio.get_running_loop().sock_accept(listener)
            return peer
        except OSError as error:
            if error.errno in GONE_AGAIN:
                continue
            if error.errno not in OUT_OF_ROOM:
                raise
            log.error("cannot accept a connection: %s", error.strerror)
            await asyncio.sleep(0.1)
