"""Directories under test, on whatever they stand on, and time that the test turns."""

import asyncio
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from redis_server import RedisServer

from kvferry.common.clock import ManualClock
from kvferry.common.hashing import SEGMENT
from kvferry.kvstore.directory import Directory, Holder, Key, LocalDirectory, LocalTable, place_of
from kvferry.kvstore.redis_directory import RedisDirectory
from kvferry.kvstore.redis_target import parse_redis_url

PATIENCE_S = 20.0


def keys_of(label: str, count: int) -> list[Key]:
    """The keys of a chain."""
    names = [blake2b(f"{label}-{i}".encode(), digest_size=32).digest() for i in range(count)]
    return [Key(names[i // SEGMENT * SEGMENT], name) for i, name in enumerate(names)]


def holders_at(*places: int, boot: int = 0) -> list[Holder]:
    """Different nodes whose hints go to these places."""
    found: list[Holder] = []
    for place in places:
        taken = {holder.address for holder in found}
        addresses = (f"10.0.0.{i}:7000" for i in range(1, 255))
        address = next(one for one in addresses if place_of(one) == place and one not in taken)
        found.append(Holder(address, boot_of(boot)))
    return found


def boot_of(number: int) -> bytes:
    return number.to_bytes(16)


async def until(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """The first true value of `condition()`, which may be a coroutine function. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        await asyncio.sleep(0.005)


class LocalWorld:
    def __init__(self) -> None:
        self._clock = ManualClock()
        self._table = LocalTable(self._clock)

    async def join(self, me: Holder) -> Directory:
        return LocalDirectory(me, self._table)

    async def told(self, directory: Directory, keys: Sequence[Key]) -> None:
        """Announce, until others can know."""
        await directory.announce(keys)
        self._table.check_integrity()

    def elapse(self, seconds: float) -> None:
        self._clock.advance(seconds)

    async def end(self) -> None:
        assert self._table.directories == 0


class RedisWorld:
    """`servers`: all that hold keys. Time passes for Redis, too: each key is given so much less to live."""

    def __init__(self, url: str, servers: Sequence[RedisServer], user: str | None = None, password: Path | None = None):
        self.target = parse_redis_url(url, user=user, password_file=password)
        self.clock = ManualClock(1e6)
        self._servers = servers
        self._joined: list[RedisDirectory] = []
        for server in servers:
            server.flush()

    async def join(self, me: Holder) -> RedisDirectory:
        directory = await RedisDirectory.open(self.target, me, self.clock)
        assert not directory.stats().open, directory.stats().last_fault
        self._joined.append(directory)
        return directory

    async def told(self, directory: RedisDirectory, keys: Sequence[Key]) -> None:
        await directory.announce(keys)
        await until(lambda: said_all(directory))
        directory.check_integrity()

    def elapse(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for server in self._servers:
            with server.client() as client:
                for key in client.keys("*"):
                    if (left := client.pttl(key)) <= seconds * 1000:
                        client.delete(key)
                    else:
                        client.pexpire(key, left - int(seconds * 1000))

    async def end(self) -> None:
        for directory in self._joined:
            stats = directory.stats()
            assert (stats.errors, stats.opened, stats.bad_values) == ({}, 0, 0), stats


def said_all(directory: RedisDirectory) -> bool:
    """Whether nothing is left to be announced, neither queued nor on its way."""
    return not directory.stats().announcements_waiting and not directory._under_way
