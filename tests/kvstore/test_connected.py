"""What a store says of what it is connected to: its directory and other stores; and what a worker of its store."""

import asyncio
import json
import logging

from peer_stories import clients_of, publish, pulled, run
from spans import span


def logged(capfd) -> list[str]:
    return [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines() if line.startswith("{")]


def test_a_directory_that_goes_and_comes_back(ground, capfd):
    async def story():
        redis = ground.redis()
        node = ground.peer(redis=redis.url)
        async with clients_of(ground, node) as (client,):
            assert (await client.stats()).directory == "up"
            redis.kill()
            labels = iter(range(10**6))

            async def asked_in_vain() -> bool:
                await client.lookup(span(ground.names(f"gone{next(labels)}", 4)))
                return (await client.stats()).directory == "down"

            await ground.until(asked_in_vain, 20)
            redis.start()
            await ground.until(lambda: is_up(client), 20)
        return redis.url

    async def is_up(client) -> bool:
        return (await client.stats()).directory == "up"

    url = run(story())
    assert [line for line in logged(capfd) if line.startswith("directory: ")] == [f"directory: {url} in use"]


def test_a_store_without_a_directory_says_so(ground, capfd):
    async def story():
        for node in (ground.peer(), ground.node()):
            async with clients_of(ground, node) as (client,):
                stats = await client.stats()
                assert (stats.directory, stats.peers_away) == ("none", 0)

    run(story())
    assert len([line for line in logged(capfd) if line.startswith("no directory (--redis)")]) == 1


def test_a_store_with_another_secret_is_away_and_one_with_the_same_is_not(ground):
    async def story():
        one, two, odd = ground.peer(start=False), ground.peer(start=False), ground.peer(start=False, secret="o" * 20)
        ground.start(one, two, odd)
        async with clients_of(ground, one, two, odd) as (writer, reader, stranger):
            names = ground.names("a", 8)
            assert await publish(ground, writer, names) == 8
            assert await pulled(ground, reader, names, holder=one.address) == 8
            assert await pulled(ground, stranger, names, holder=one.address, within_s=1) == 0
            assert (await reader.stats()).peers_away == 0
            assert (await stranger.stats()).peers_away == 1

    run(story())


def test_a_store_that_is_not_there_at_the_start_is_a_warning_and_its_coming_is_told(ground, caplog):
    caplog.set_level(logging.INFO)

    async def story():
        node = ground.node(start=False)
        client, told = ground.client(node), []
        client.on_change(lambda: told.append(client.connected))
        await client.start()
        try:
            assert not client.connected
            (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
            assert "the store is not there yet" in warning.message
            await asyncio.to_thread(node.start)
            await ground.until(lambda: told == [True])
            node.kill()
            await ground.until(lambda: told == [True, False])
        finally:
            await client.close()

    run(story())
