"""Many commands to Redis in one round trip, whether it is one server, one that Sentinel names, or a cluster."""

import asyncio
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from hiredis import pack_command
from redis import exceptions as redis_errors
from redis.asyncio import ConnectionPool, RedisCluster, Sentinel, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, SentinelConnectionPool
from redis.backoff import NoBackoff

from kvferry.common.errors import ConfigError
from kvferry.kvstore.redis_target import KEY_PREFIX, RedisTarget

HOST_S = 0.3  # one host's time to answer while we connect, before the next is asked
MAX_CONNECTIONS = 16  # to one server
CLOSE_S = 1.0
MAX_TAGS = 4096  # tried to find one for each server of a cluster

Command = Sequence[bytes | str]  # its second word is its key
Reply = Any  # what Redis answered, or the error that it was


class Moving(redis_errors.RedisError):
    """A key whose slot is on its way from one node of a cluster to another one: no fault, and soon over."""


MOVING = (redis_errors.AskError, redis_errors.TryAgainError)  # AskError: MovedError, too


KINDS: tuple[tuple[type[Exception], str], ...] = (
    (ConfigError, "configuration"),
    (TimeoutError, "timeout"),
    (redis_errors.TimeoutError, "timeout"),
    (redis_errors.AuthenticationError, "authentication"),
    (redis_errors.AuthenticationWrongNumberOfArgsError, "authentication"),
    (redis_errors.NoPermissionError, "permission"),
    (redis_errors.ReadOnlyError, "read_only"),
    (redis_errors.OutOfMemoryError, "out_of_memory"),
    (redis_errors.BusyLoadingError, "loading"),
    (MasterNotFoundError, "sentinel"),
    (Moving, "moving"),
    (redis_errors.RedisClusterException, "cluster"),
    (redis_errors.ClusterError, "cluster"),
    (redis_errors.AskError, "cluster"),  # MovedError is one
    (redis_errors.ConnectionError, "connection"),
    (OSError, "connection"),
    (redis_errors.RedisError, "reply"),
)


WORDS = {
    "timeout": "it did not answer in time",
    "authentication": "it does not accept our user and password",
    "permission": "our user may not do what the directory needs, which its ACL has to give",
    "read_only": "it is a replica, which nobody may write to",
    "out_of_memory": "its memory is full, and it may not evict anything",
    "loading": "it is loading its data",
    "sentinel": "no sentinel that answers knows a master of that name that is up",
}


def kind_of(error: BaseException) -> str:
    """One word for an error, to count it by; `bug` for what Redis and the network do not explain."""
    return next((kind for known, kind in KINDS if isinstance(error, known)), "bug")


def sentence_of(error: BaseException) -> str:
    """What is wrong, in one line for people, without secrets and the names of blocks."""
    if isinstance(error, redis_errors.AskError):
        return "it is one node of a cluster that is elsewhere now, or its URL should begin with redis+cluster:"
    if words := WORDS.get(kind_of(error)):
        return words
    text = re.sub(rf"{KEY_PREFIX}\S+", "a key", " ".join(str(error).split()))
    return f"{kind_of(error)}: {text[:200] or type(error).__name__}"


class Pipe(Protocol):
    async def run(self, commands: Sequence[Command]) -> list[Reply]:
        """The replies, in order; an error in the place of each command that was refused. Raises if it breaks."""
        ...

    def tags(self) -> list[str]:
        """What a key has in braces to be on each of the servers that are written to."""
        ...

    async def close(self) -> None: ...


class ServerPipe:
    """One server. `sentinel`: who says which it is at the moment."""

    def __init__(self, pool: ConnectionPool, sentinel: Sentinel | None = None):
        self._pool = pool
        self._sentinel = sentinel

    async def run(self, commands: Sequence[Command]) -> list[Reply]:
        connection = await self._pool.get_connection()
        try:
            await connection.send_packed_command(b"".join([pack_command(tuple(command)) for command in commands]))
            return [await _read(connection) for _ in commands]
        except BaseException:  # what was asked may still be answered: nobody else may read here
            await connection.disconnect(nowait=True)
            raise
        finally:
            await self._pool.release(connection)

    def tags(self) -> list[str]:
        return ["0"]

    async def close(self) -> None:
        await _close_all([self._pool, *(self._sentinel.sentinels if self._sentinel else ())])


class ClusterPipe:
    """A cluster. What has moved is asked for where it is now, in one more round trip; what is moving is `Moving`."""

    def __init__(self, cluster: RedisCluster):
        self._cluster = cluster

    async def run(self, commands: Sequence[Command]) -> list[Reply]:
        replies = await self._run(commands)
        moved = [i for i, reply in enumerate(replies) if isinstance(reply, redis_errors.MovedError)]
        for i in moved:
            await self._cluster.nodes_manager.move_slot(replies[i])
        for i, reply in zip(moved, await self._run([commands[i] for i in moved]) if moved else (), strict=True):
            replies[i] = reply
        return [Moving(*one.args) if isinstance(one, MOVING) else one for one in replies]

    async def _run(self, commands: Sequence[Command]) -> list[Reply]:
        pipeline = self._cluster.pipeline()
        for command in commands:  # that a node is given spares finding it by each of the keys
            pipeline.execute_command(*command, target_nodes=self._cluster.get_node_from_key(command[1]))
        return await pipeline.execute(raise_on_error=False, allow_redirections=False)

    def tags(self) -> list[str]:
        found: dict[str, str] = {}
        servers = len(self._cluster.get_primaries())
        for tag in map(str, range(MAX_TAGS)):
            found.setdefault(self._cluster.get_node_from_key(f"{{{tag}}}").name, tag)
            if len(found) == servers:
                break
        return list(found.values())

    async def close(self) -> None:
        await _close_all([self._cluster])


async def connect(target: RedisTarget) -> Pipe:
    """Takes as long as it takes; raises ConfigError and what redis-py raises, and leaves nothing open then."""
    login = target.login()
    if target.kind == "redis+cluster":
        return await _connect_cluster(target, login)
    sentinel = None
    given = {"db": target.db, "protocol": 2, "driver_info": None, "socket_timeout": None, **login}
    given |= {"socket_connect_timeout": HOST_S, "max_connections": MAX_CONNECTIONS}
    if target.kind == "unix":
        pool = ConnectionPool(connection_class=UnixDomainSocketConnection, path=target.path, **given)
    elif target.kind == "redis":
        ((host, port),) = target.hosts
        secured = {"connection_class": SSLConnection, **target.encryption()} if target.tls else {}
        pool = ConnectionPool(host=host, port=port, **secured, **given)
    else:
        asked = {"socket_timeout": HOST_S, "socket_connect_timeout": HOST_S, "protocol": 2, "driver_info": None}
        asked |= {"retry": Retry(NoBackoff(), 0), **target.sentinel_login()}
        secured = {"ssl": True, **target.encryption()} if target.tls else {}
        sentinel = Sentinel(target.hosts, sentinel_kwargs={**asked, **secured})
        pool = SentinelConnectionPool(target.master, sentinel, **secured, **given)
    pipe = ServerPipe(pool, sentinel)
    try:
        await pool.release(await pool.get_connection())
    except BaseException:
        await pipe.close()
        raise
    return pipe


async def _connect_cluster(target: RedisTarget, login: dict[str, str]) -> ClusterPipe:
    cluster = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in target.hosts],
        require_full_coverage=False,
        retry=Retry(NoBackoff(), 0),
        max_connections=MAX_CONNECTIONS,
        socket_timeout=HOST_S,
        socket_connect_timeout=HOST_S,
        protocol=2,
        driver_info=None,
        ssl=target.tls,
        **target.encryption(),
        **login,
    )
    await cluster.initialize()  # closes what it opened if it fails
    return ClusterPipe(cluster)


async def _read(connection: Connection) -> Reply:
    try:
        return await connection.read_response()
    except redis_errors.ResponseError as error:
        return error


async def _close_all(clients: Iterable[Any]) -> None:
    """Connections that are broken may say so when they are closed, or never be; they are of no use to anybody."""
    with suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await asyncio.gather(*(client.aclose() for client in clients), return_exceptions=True)
