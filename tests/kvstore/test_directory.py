"""One suite for every directory: what nodes tell one another, on a clock that the test turns."""

import asyncio
import random
import time
from pathlib import Path

import pytest
from directory_world import LocalWorld, RedisWorld, boot_of, holders_at, keys_of
from redis.exceptions import AuthenticationError, NoPermissionError
from redis_server import Cluster, RedisServer, Sentinels

from kvferry.common.clock import ManualClock
from kvferry.kvstore import redis_directory
from kvferry.kvstore.directory import Holder, LocalDirectory, LocalTable
from kvferry.kvstore.redis_target import redis_acl

PASSWORD = "correct horse"
REMOTE = ["redis", "unix", "user", pytest.param("cluster", marks=pytest.mark.long)]
REMOTE += [pytest.param("cluster_user", marks=pytest.mark.long), pytest.param("sentinel", marks=pytest.mark.long)]


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """What is answered is not a matter of how fast this machine is at the moment."""
    monkeypatch.setattr(redis_directory, "BUDGET_S", 5.0)


@pytest.fixture(scope="module")
def redis_server():
    server = RedisServer().start()
    yield server
    server.end()


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster()
    yield cluster
    cluster.end()


@pytest.fixture(scope="module")
def sentinels():
    sentinels = Sentinels()
    yield sentinels
    sentinels.end()


def world_of(kind, request, folder: Path):
    password = folder / "password"
    password.write_text(PASSWORD + "\n")
    get = request.getfixturevalue
    if kind == "local":
        return LocalWorld()
    if kind in ("cluster", "cluster_user"):
        cluster = get("cluster")
        if kind == "cluster":
            return RedisWorld(cluster.url, cluster.servers)
        for server in cluster.servers:
            server.ask(*redis_acl("kvferry", PASSWORD).split())
        return RedisWorld(cluster.url, cluster.servers, "kvferry", password)
    if kind == "sentinel":
        sentinels = get("sentinels")
        return RedisWorld(sentinels.url, [sentinels.master])
    server = get("redis_server")
    if kind == "unix":
        return RedisWorld(f"unix://{server.socket}", [server])
    if kind == "user":
        server.ask(*redis_acl("kvferry", PASSWORD).split())
        return RedisWorld(server.url, [server], "kvferry", password)
    return RedisWorld(server.url, [server])


@pytest.fixture
def run(request, tmp_path):
    """Runs a story in a world: `run(story)` with `async def story(world)`. All it opened is closed in the end."""

    def run(story, kind):
        async def whole():
            world = world_of(kind, request, tmp_path)
            opened = []
            join = world.join

            async def joined(me):
                opened.append(await join(me))
                return opened[-1]

            world.join = joined
            async with asyncio.timeout(60):
                await story(world)
            for directory in opened:
                await directory.close()
            await world.end()
            assert len(asyncio.all_tasks()) == 1, "a task was left"

        asyncio.run(whole())

    return run


EVERYWHERE = pytest.mark.parametrize("kind", ["local", *REMOTE])


# -- hints ------------------------------------------------------------------------------------------------------------


@EVERYWHERE
def test_what_one_announces_the_others_find(run, kind):
    async def story(world):
        a, b, c = holders_at(0, 1, 0)
        at_a, at_b, at_c = [await world.join(one) for one in (a, b, c)]
        keys = keys_of("x", 200)
        assert await at_b.locate(keys) == [()] * 200
        assert await at_b.locate([]) == []
        await world.told(at_a, keys[:100])
        assert await at_b.locate(keys) == [(a,)] * 100 + [()] * 100
        await world.told(at_b, keys[50:150])
        assert await at_c.locate(keys) == [(a,)] * 50 + [(a, b)] * 50 + [(b,)] * 50 + [()] * 50
        assert (
            await at_c.locate(keys[::-7]) == [{0: (a,), 1: (a, b), 2: (b,), 3: ()}[i // 50] for i in range(200)][::-7]
        )

    run(story, kind)


@EVERYWHERE
def test_nobody_is_told_of_himself(run, kind):
    async def story(world):
        a, b = holders_at(0, 1)
        at_a, at_b = await world.join(a), await world.join(b)
        keys = keys_of("x", 70)
        await world.told(at_a, keys)
        await world.told(at_b, keys)
        assert await at_a.locate(keys) == [(b,)] * 70
        assert await at_b.locate(keys) == [(a,)] * 70
        again = await world.join(a._replace(boot_id=boot_of(1)))
        assert await again.locate(keys) == [(b,)] * 70, "a node is not told of what it had before it restarted"

    run(story, kind)


@EVERYWHERE
def test_two_are_told_at_most_and_each_once(run, kind):
    async def story(world):
        many = holders_at(0, 0, 1, 1)
        reader = await world.join(Holder("10.9.9.9:7000", boot_of(0)))
        keys = keys_of("x", 3)
        for holder in many:
            directory = await world.join(holder)
            await world.told(directory, keys)
        assert await reader.locate(keys) == [(many[1], many[3])] * 3, "the last of each place"
        restarted = many[1]._replace(boot_id=boot_of(7))
        await world.told(await world.join(restarted), keys)
        assert await reader.locate(keys) == [(restarted, many[3])] * 3

    run(story, kind)


@EVERYWHERE
def test_hints_lapse_unless_they_are_used(run, kind):
    async def story(world):
        a, b = holders_at(0, 1)
        at_a, at_b = await world.join(a), await world.join(b)
        used, unused = keys_of("used", 66), keys_of("unused", 66)
        await world.told(at_a, used + unused)
        world.elapse(3000)
        await world.told(at_a, used)
        world.elapse(590)
        assert await at_b.locate(used + unused) == [(a,)] * 132
        world.elapse(15)
        assert await at_b.locate(used + unused) == [(a,)] * 66 + [()] * 66
        world.elapse(3000)
        assert await at_b.locate(used) == [()] * 66

    run(story, kind)


# -- claims -----------------------------------------------------------------------------------------------------------


@EVERYWHERE
def test_a_claim_is_one_nodes(run, kind):
    async def story(world):
        a, b = holders_at(0, 0)
        at_a, at_b = await world.join(a), await world.join(b)
        key, other = keys_of("x", 2)
        assert await at_a.claim(key) is None
        assert await at_b.claim(key) == a
        assert await at_b.claim(key) == a, "asking does not change it"
        assert await at_a.claim(key) is None, "it is ours already"
        assert await at_b.claim(other) is None
        assert await at_a.locate([key, other]) == [(), ()], "a claim is not a hint"

    run(story, kind)


@EVERYWHERE
def test_a_claim_lapses_unless_it_is_renewed(run, kind):
    async def story(world):
        a, b = holders_at(0, 1)
        at_a, at_b = await world.join(a), await world.join(b)
        kept, left = keys_of("kept", 1)[0], keys_of("left", 1)[0]
        assert [await at_a.claim(key) for key in (kept, left)] == [None, None]
        for _ in range(3):
            world.elapse(1.0)
            assert await at_b.claim(kept) == a
            await at_a.renew([kept])
        world.elapse(1.0)
        assert await at_b.claim(kept) == a
        assert await at_b.claim(left) is None
        world.elapse(1.5)
        await at_a.renew([kept, left])
        assert await at_b.claim(kept) is None, "what has lapsed stays so"
        assert await at_a.claim(left) == b

    run(story, kind)


@EVERYWHERE
def test_anothers_claim_is_not_renewed(run, kind):
    async def story(world):
        a, b = holders_at(0, 1)
        at_a, at_b = await world.join(a), await world.join(b)
        (key,) = keys_of("x", 1)
        assert await at_a.claim(key) is None
        world.elapse(1.5)
        await at_b.renew([key])
        await at_b.renew([])
        assert await at_b.claim(key) == a
        world.elapse(0.8)
        assert await at_b.claim(key) is None

    run(story, kind)


@EVERYWHERE
def test_a_claim_is_taken_from_one_who_does_not_compute(run, kind):
    async def story(world):
        a, b, c = holders_at(0, 1, 0)
        at_a, at_b, at_c = [await world.join(one) for one in (a, b, c)]
        (key,) = keys_of("x", 1)
        assert await at_a.claim(key) is None
        assert await at_b.claim(key, instead_of=c) == a
        assert await at_b.claim(key, instead_of=a) is None
        assert await at_c.claim(key, instead_of=a) == b, "it is not theirs any more"
        await at_a.renew([key])
        assert await at_c.claim(key) == b
        world.elapse(1.9)
        assert await at_c.claim(key) == b, "it was taken for two seconds"
        world.elapse(0.2)
        assert await at_c.claim(key, instead_of=b) is None, "there was nothing left to take over"
        assert await at_a.claim(key) == c

    run(story, kind)


@EVERYWHERE
def test_of_many_who_take_a_claim_over_at_once_one_has_it(run, kind):
    async def story(world):
        dead, *others = holders_at(*[0, 1] * 4)
        at_dead, *directories = [await world.join(one) for one in (dead, *others)]
        for key in keys_of("x", 5):
            assert await at_dead.claim(key) is None
            told = await asyncio.gather(*(one.claim(key, instead_of=dead) for one in directories))
            assert told.count(None) == 1, "one computes"
            owner = others[told.index(None)]
            assert set(told) == {None, owner}, "and the others know who"
            assert await at_dead.claim(key) == owner
            rest = [one for one, answer in zip(directories, told, strict=True) if answer is not None]
            again = await asyncio.gather(*(one.claim(key, instead_of=owner) for one in rest))
            assert again.count(None) == 1, "the turn is over at once"

    run(story, kind)


@EVERYWHERE
def test_a_restarted_nodes_claims_are_its_own(run, kind):
    async def story(world):
        a, b = holders_at(0, 1)
        after = a._replace(boot_id=boot_of(1))
        at_a, at_b = await world.join(a), await world.join(b)
        (key,) = keys_of("x", 1)
        assert await at_a.claim(key) is None
        restarted = await world.join(after)
        assert await restarted.claim(key) is None
        assert await at_b.claim(key) == after
        await at_a.renew([key])
        world.elapse(1.5)
        assert await at_b.claim(key, instead_of=a) == after

    run(story, kind)


# -- the two say the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REMOTE)
def test_redis_says_what_a_table_says(run, kind):
    """Anything that three nodes may do. Announcements come a quarter of an hour apart, so that none is left out."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    pick = random.Random(seed)

    async def story(world):
        local = LocalWorld()
        nodes = [(await local.join(one), await world.join(one)) for one in holders_at(0, 1, 1)]
        who = holders_at(0, 1, 1)
        keys = [*keys_of("x", 65)[::16], *keys_of("y", 2)]
        for step in range(250):
            here, there = pick.choice(nodes)
            some = pick.sample(keys, pick.randrange(1, 4))
            match pick.choice(["announce", "locate", "claim", "claim", "renew", "take", "wait", "wait"]):
                case "announce":
                    local.elapse(901)
                    world.elapse(901)
                    await local.told(here, some)
                    await world.told(there, some)
                case "locate":
                    assert await there.locate(some) == await here.locate(some), step
                case "claim":
                    assert await there.claim(some[0]) == await here.claim(some[0]), step
                case "take":
                    other = pick.choice(who)
                    mine = await here.claim(some[0], instead_of=other)
                    assert await there.claim(some[0], instead_of=other) == mine, step
                case "renew":
                    await here.renew(some)
                    await there.renew(some)
                case "wait":
                    seconds = pick.choice([0.3, 0.7, 1.7])
                    local.elapse(seconds)
                    world.elapse(seconds)
        for here, _ in nodes:
            await here.close()

    run(story, kind)


# -- the local one ----------------------------------------------------------------------------------------------------


def test_a_table_is_bounded():
    async def story():
        clock = ManualClock()
        table = LocalTable(clock, most=100)
        (a,) = holders_at(0)
        keys = keys_of("x", 150)
        alone = LocalDirectory(a, table)
        await alone.announce(keys)
        reader = LocalDirectory(Holder("10.9.9.9:7000", boot_of(0)), table)
        assert not any(await reader.locate(keys)), "nobody was there to read it"
        await alone.announce(keys)
        table.check_integrity()
        assert await reader.locate(keys) == [()] * 50 + [(a,)] * 100
        clock.advance(3600)
        await alone.announce(keys[:1])
        table.check_integrity()
        assert len(table._hints) == 1, "what has lapsed goes when something is said"

    asyncio.run(story())


# -- what only Redis has ----------------------------------------------------------------------------------------------


def test_what_is_written_to_redis(redis_server, run):
    async def story(world):
        (a,) = holders_at(1)
        directory = await world.join(a)
        redis_server.flush()
        keys = keys_of("x", 65)
        await world.told(directory, keys)
        await directory.claim(keys[3])
        with redis_server.client() as client:
            found = {key.decode(): (client.get(key), client.pttl(key)) for key in client.keys("*")}
        first, second = keys[0].name[:8].hex(), keys[64].name[:8].hex()
        hints = {f"kvf:{{{first}}}:{key.name[:16].hex()}:1" for key in keys[:64]}
        hints.add(f"kvf:{{{second}}}:{keys[64].name[:16].hex()}:1")
        claim = f"kvf:{{{first}}}:c:{keys[3].name[:16].hex()}"
        marks = found.keys() - hints - {claim}
        assert len(marks) == 1
        assert found.keys() >= hints
        assert {value for value, _ in found.values()} == {found[claim][0]}
        assert all(3_590_000 < found[key][1] <= 3_600_000 for key in hints | marks)
        assert 1_800 < found[claim][1] <= 2_000
        assert len(found[claim][0]) <= 44, "more takes Redis another allocation"

    run(story, "redis")


def test_a_look_up_asks_once_for_each_segment(redis_server, run):
    async def story(world):
        (a,) = holders_at(1)
        directory = await world.join(a)
        redis_server.ask("CONFIG", "RESETSTAT")
        await directory.locate(keys_of("x", 300))
        stats = redis_server.client().info("commandstats")
        assert stats.pop("cmdstat_mget")["calls"] == 5
        assert not [name for name in stats if not name.startswith(("cmdstat_config", "cmdstat_client"))]

    run(story, "redis")


def test_a_claim_lapses_by_redis_own_clock(run):
    async def story(world):
        a, b = holders_at(0, 1)
        at_a, at_b = await world.join(a), await world.join(b)
        kept, left = keys_of("kept", 1)[0], keys_of("left", 1)[0]
        assert [await at_a.claim(key) for key in (kept, left)] == [None, None]
        begun = time.monotonic()
        while await at_b.claim(left) == a:
            await at_a.renew([kept])
            await asyncio.sleep(0.05)
        assert 1.5 < time.monotonic() - begun < 5
        assert await at_b.claim(kept) == a

    run(story, "redis")


def test_what_was_told_lately_is_not_told_again(redis_server, run):
    async def story(world):
        a, b = holders_at(0, 1)
        at_a, at_b = await world.join(a), await world.join(b)
        keys = keys_of("x", 100)

        async def told(keys):
            before = at_a.stats().announced
            await world.told(at_a, keys)
            return at_a.stats().announced - before

        assert await told(keys) == 100
        assert await told(keys) == 0
        assert await told(keys_of("x", 120)) == 20
        world.elapse(901)
        assert await told(keys) == 100
        redis_server.flush()
        assert await told(keys) == 0, "nobody has noticed yet"
        assert await told(keys_of("y", 1)) == 1, "with this it is noticed"
        assert await told(keys) == 100
        assert await at_b.locate(keys) == [(a,)] * 100

    run(story, "redis")


@pytest.mark.parametrize("kind", ["user", pytest.param("cluster_user", marks=pytest.mark.long)])
def test_its_user_may_do_nothing_else(request, run, kind):
    async def story(world):
        servers = world._servers
        (a,) = holders_at(0)
        directory = await world.join(a)
        await world.told(directory, keys_of("x", 3))
        for server in servers:
            server.ask("ACL", "LOG", "RESET")
            with server.client(username="kvferry", password=PASSWORD) as client:
                for refused in (
                    ["KEYS", "*"],
                    ["FLUSHALL"],
                    ["FLUSHDB"],
                    ["SCAN", "0"],
                    ["DEL", "kvf:{0}:x:0"],
                    ["CONFIG", "GET", "*"],
                    ["ACL", "LIST"],
                    ["EVAL", "return 1", "0"],
                    ["SHUTDOWN"],
                    ["MONITOR"],
                    ["PUBLISH", "kvf:x", "y"],
                    ["CLUSTER", "RESET"],
                    ["GET", "somebody:elses"],
                    ["SET", "somebody:elses", "x"],
                    ["MGET", "kvf:{0}:x:0", "somebody:elses"],
                ):
                    with pytest.raises(NoPermissionError, match="permission"):
                        client.execute_command(*refused)
            with server.client(username="kvferry", password="another") as client, pytest.raises(AuthenticationError):
                client.execute_command("GET", "kvf:{0}:x:0")

    run(story, kind)
