"""A long prompt's look-ups that take too long: they fail by themselves, and short ones are answered after them."""

import asyncio

import pytest
from directory_world import holders_at, keys_of, said_all, until
from redis_proxy import Proxy
from redis_server import RedisServer

from kvferry.kvstore.redis_directory import RedisDirectory
from kvferry.kvstore.redis_target import parse_redis_url

SHORT, LONG = keys_of("short", 64), keys_of("long", 1024)


@pytest.fixture
def server():
    server = RedisServer().start()
    yield server
    server.end()


def test_a_long_prompt_does_not_shut_redis_off(server):
    async def story():
        proxy = await Proxy(server.port).start()
        a, b = holders_at(0, 1)
        target = parse_redis_url(f"redis://127.0.0.1:{proxy.port}")
        ours, theirs = await RedisDirectory.open(target, a), await RedisDirectory.open(target, b)
        await theirs.announce([*SHORT, *LONG])
        await until(lambda: said_all(theirs))

        async def found() -> bool:
            return await ours.locate(SHORT) == [(b,)] * len(SHORT)

        await until(found)
        opened = ours.stats().opened
        proxy.change = lambda piece: b""
        for _ in range(3):
            assert await ours.locate(LONG) == [()] * len(LONG)
        stats = ours.stats()
        assert (stats.opened, stats.errors["busy"]) == (opened, 3)
        proxy.change = lambda piece: piece
        await until(found)
        proxy.change = lambda piece: b""
        while not ours.stats().open:  # one call, unless this process was late itself
            assert await ours.locate(SHORT) == [()] * len(SHORT)
        for one in (ours, theirs):
            await one.close()
        await proxy.end()

    asyncio.run(asyncio.wait_for(story(), 60))
