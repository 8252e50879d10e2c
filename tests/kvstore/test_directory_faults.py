"""A Redis that fails: within its budget a call is answered as on a miss, nobody is told an error, and it heals."""

import asyncio
import logging
import os
import random
import time

import pytest
import xxhash
from directory_world import boot_of, holders_at, keys_of, said_all, until
from redis_proxy import Proxy
from redis_server import Cluster, RedisServer, Sentinels

from kvferry.kvstore import redis_directory
from kvferry.kvstore.directory import HINT_S, Holder
from kvferry.kvstore.redis_directory import CALLS_AT_ONCE, RedisDirectory
from kvferry.kvstore.redis_entries import claim_key, encode, hint_key
from kvferry.kvstore.redis_pipe import ServerPipe, connect
from kvferry.kvstore.redis_target import parse_redis_url

LONG = pytest.mark.long
SLACK_S = 0.01
TURNS = 50  # of the event loop, for what is decided to be done
A, B = holders_at(0, 1)
READER = Holder("10.9.9.9:7000", boot_of(0))
KEYS = keys_of("x", 130)


@pytest.fixture
def server():
    server = RedisServer().start()
    yield server
    server.end()


@pytest.fixture
def patience(monkeypatch):
    """For what must not fail on a machine that is slow at the moment."""
    monkeypatch.setattr(redis_directory, "BUDGET_S", 5.0)


@pytest.fixture
def lines(caplog):
    """What was logged, by level."""
    caplog.set_level(logging.INFO, "kvferry")
    return lambda level: [record.getMessage() for record in caplog.records if record.levelname == level]


async def in_time(answer, seconds=None):
    """What a call answers, which must not take longer than its budget; measured by this loop's own clock, which is late
    where this machine is."""
    call = asyncio.ensure_future(answer)
    await asyncio.wait([call], timeout=redis_directory.BUDGET_S + SLACK_S if seconds is None else seconds)
    for _ in range(TURNS):
        if call.done():
            break
        await asyncio.sleep(0)
    assert call.done(), "it took longer than its budget"
    return call.result()


async def at_once(answer):
    """The same of a call that waits for nothing."""
    return await in_time(answer, 0)


class Story:
    """A node A and a reader at one Redis. What they open, it closes."""

    def __init__(self, url, **given):
        self.target = parse_redis_url(url, **given)

    async def __aenter__(self):
        self.a = await RedisDirectory.open(self.target, A)
        self.reader = await RedisDirectory.open(self.target, READER)
        return self

    async def __aexit__(self, *_):
        for directory in (self.a, self.reader):
            directory.check_integrity()
            await directory.close()

    async def told(self, keys=KEYS):
        await self.a.announce(keys)
        await until(lambda: said_all(self.a))

    async def finds(self, keys=KEYS):
        return await self.reader.locate(keys) == [(A,)] * len(keys)

    async def misses(self):
        """Each verb answers as on a miss, in time."""
        key = keys_of("missed", 1)[0]
        for answer, expected in (
            (self.reader.locate(KEYS), [()] * len(KEYS)),
            (self.reader.claim(key), None),
            (self.reader.claim(key, instead_of=A), None),
            (self.reader.renew([key]), None),
            (self.reader.announce(keys_of("later", 3)), None),
        ):
            assert await in_time(answer) == expected

    async def breaks(self):
        """It misses until it is left alone: at once, unless this process was late itself."""
        await self.misses()
        while not self.reader.stats().open:
            await self.misses()

    async def heals(self, keys=KEYS):
        """By itself, and what is used again is found again."""
        await self.told(keys_of(f"new {time.monotonic()}", 1))
        await until(lambda: not self.reader.stats().open and not self.a.stats().open)
        await self.told(keys)
        await until(lambda: self.finds(keys))
        key = keys_of(f"claimed {time.monotonic()}", 1)[0]
        assert await self.a.claim(key) is None
        assert await self.reader.claim(key) == A


def play(story):
    async def whole():
        async with asyncio.timeout(120):
            await story
        assert len(asyncio.all_tasks()) == 1, "a task was left"

    asyncio.run(whole())


# -- Redis itself -----------------------------------------------------------------------------------------------------


def test_redis_is_killed_and_restarted(server, lines):
    async def story():
        async with Story(server.url) as at:
            await at.told()
            await until(at.finds)
            for restart in range(1, 3):
                server.kill()
                await at.misses()
                await at.a.locate(KEYS)
                assert at.reader.stats().opened == at.a.stats().opened == restart
                assert len(lines("WARNING")) == 2 * restart
                server.start()
                await at.heals()
                assert len(lines("INFO")) == 2 * restart
            stats = at.reader.stats()
            assert stats.errors.keys() == {"connection"}
            assert server.url in lines("WARNING")[0]

    play(story())


def test_redis_is_not_there_at_the_start(server, lines):
    async def story():
        server.kill()
        async with Story(server.url) as at:
            assert at.a.stats().open
            await at.misses()
            await at.a.announce(KEYS)
            assert len(lines("WARNING")) == 2
            server.start()
            await until(at.finds)
            await at.heals()
            assert len(lines("WARNING")) == len(lines("INFO")) == 2

    play(story())


def test_redis_comes_back_without_our_user(server, tmp_path, lines):
    """As it does after a restart, unless it has an aclfile: the log says what is wrong now, not what was."""

    async def story():
        file = tmp_path / "password"
        file.write_text("one\n")
        admit = ["ACL", "SETUSER", "worker", "on", ">one", "~kvf:*", "+@all"]
        server.ask(*admit)
        async with Story(server.url, user="worker", password_file=file) as at:
            await at.told()
            server.kill()
            await at.misses()
            await at.a.locate(KEYS)
            assert len(lines("WARNING")) == 2
            assert all("not used until it works again: connection: " in line for line in lines("WARNING"))
            server.start()
            await until(lambda: len(lines("WARNING")) == 4)
            assert all(line.endswith("still does not work: it does not accept our user and password")
                       for line in lines("WARNING")[2:])  # fmt: skip
            server.ask(*admit)
            await at.heals()

    play(story())


@pytest.mark.parametrize("tls", ["", "s"])
@pytest.mark.parametrize("where", ["redis{s}://127.0.0.1:1", "redis{s}+sentinel://127.0.0.1:1,127.0.0.1:2/main",
                                   "redis{s}+cluster://127.0.0.1:1,127.0.0.1:2"])  # fmt: skip
def test_nothing_is_there_at_all(where, tls, lines):
    async def story():
        async with Story(where.replace("{s}", tls)) as at:
            await at.misses()
            assert at.reader.stats().errors.keys() <= {"connection", "sentinel", "cluster"}
            assert len(lines("WARNING")) == 2

    play(story())


def test_a_closed_directory_answers_as_on_a_miss(server):
    async def story():
        async with Story(server.url) as at:
            await at.told()
            third = await RedisDirectory.open(at.target, B)
            asking = asyncio.create_task(third.locate(KEYS))
            await asyncio.sleep(0)
            await third.close()
            assert await asking == [(A,)] * len(KEYS), "it was under way"
            assert await third.locate(KEYS) == [()] * len(KEYS)
            assert await third.claim(KEYS[0]) is None
            await third.renew(KEYS[:1])
            await third.announce(KEYS)
            assert third.stats().errors == {}

    play(story())


def test_redis_is_flushed(server, patience):
    async def story():
        async with Story(server.url) as at:
            await at.told()
            server.flush()
            assert not any(await at.reader.locate(KEYS))
            assert await at.reader.claim(KEYS[0]) is None
            await at.told(keys_of("new", 1))
            await at.heals()
            assert (at.a.stats().opened, at.a.stats().errors) == (0, {})

    play(story())


@pytest.mark.parametrize("pause_s", [1.5, pytest.param(5.0, marks=LONG)])
def test_redis_is_paused(server, pause_s, lines):
    async def story():
        async with Story(server.url) as at:
            await at.told()
            server.pause()
            end = time.monotonic() + pause_s
            while not at.reader.stats().open:  # one call, unless this process was late itself
                assert not any(await in_time(at.reader.locate(KEYS)))
            while time.monotonic() < end:
                assert not any(await at_once(at.reader.locate(KEYS)))
                assert await at_once(at.reader.claim(KEYS[0])) is None
                await asyncio.sleep(0.01)
            assert at.reader.stats().errors["timeout"] >= (2 if pause_s > 4 else 1), "it was tried again meanwhile"
            server.resume()
            await at.heals()
            assert at.reader.stats().opened == 1
            warnings, infos = lines("WARNING"), lines("INFO")
            assert len(warnings) == len(infos) == at.reader.stats().opened + at.a.stats().opened

    play(story())


@pytest.mark.parametrize(
    ("fault", "cure", "kind"),
    [
        (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"], "out_of_memory"),
        (["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"], "read_only"),
        (["ACL", "SETUSER", "default", "-get"], ["ACL", "SETUSER", "default", "+get"], "permission"),
        (["ACL", "SETUSER", "default", "-pexpire"], ["ACL", "SETUSER", "default", "+pexpire"], "permission"),
        (["ACL", "SETUSER", "default", "resetkeys"], ["ACL", "SETUSER", "default", "allkeys"], "permission"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_redis_refuses(server, fault, cure, kind, lines):
    async def story():
        key = keys_of("refused", 1)[0]
        async with Story(server.url) as at:
            await at.told()
            assert await at.a.claim(key) is None
            server.ask(*fault)
            assert await at.a.claim(keys_of("another", 1)[0]) is None
            await at.a.renew([key])
            await until(lambda: at.a.stats().errors.get(kind, 0) >= 2)
            assert at.a.stats().open
            assert "kvf:" not in "".join(lines("WARNING"))
            server.ask(*cure)
            await at.heals()

    play(story())


def test_redis_wants_a_password(server, tmp_path, lines):
    async def story():
        file = tmp_path / "password"
        file.write_text("wrong, but secret\n")
        with server.client() as admin:
            admin.config_set("requirepass", "right")
            async with Story(server.url, password_file=file) as at:
                await at.misses()
                assert at.reader.stats().open
                assert at.reader.stats().errors.keys() == {"authentication"}
                file.write_text("right\n")
                await at.heals()
                file.unlink()
                admin.config_set("requirepass", "another")
                admin.client_kill_filter(_type="normal", skipme=True)
                await at.breaks()
                await until(lambda: at.reader.stats().errors.get("configuration", 0) >= 1)
                file.write_text("another\n")
                await at.heals()
        assert not [line for line in lines("WARNING") if "secret" in line or "right" in line or "another" in line]

    play(story())


def test_redis_has_too_many_clients(server):
    async def story():
        async with Story(server.url) as at:
            with server.client() as admin:
                admin.config_set("maxclients", "1")
                admin.client_kill_filter(_type="normal", skipme=True)
                await at.breaks()
                await until(lambda: at.reader.stats().errors.get("connection", 0) >= 2)
                assert at.reader.stats().open
                admin.config_set("maxclients", "1000")
            await at.heals()

    play(story())


def test_redis_is_loading(server):
    async def story():
        with server.client() as admin:
            filling = admin.pipeline(transaction=False)
            for i in range(4000):
                filling.set(f"filler:{i}", os.urandom(5000))
            filling.execute()
            admin.save()
        async with Story(server.url) as at:
            server.kill()
            server.start("key-load-delay 500", wait=False)  # it answers now and then while it loads
            await at.breaks()
            await until(lambda: at.reader.stats().errors.get("loading", 0) >= 1)
            assert at.reader.stats().open
            await at.heals()

    play(story())


# -- what stands in it ------------------------------------------------------------------------------------------------

GOOD = encode(B)


def checked(rest: bytes) -> bytes:
    """With a checksum that is right."""
    return xxhash.xxh3_64_digest(rest)[:4] + rest


BAD = {
    "empty": b"",
    "text": b"garbage",
    "address only": b"10.0.0.1:7000",
    "cut short": GOOD[:-1],
    "cut to its head": GOOD[:21],
    "one byte more": GOOD + b"0",
    "flipped": GOOD[:-1] + bytes([GOOD[-1] ^ 1]),
    "another version": checked(b"\2" + GOOD[5:]),
    "no address": checked(b"\1" + boot_of(0)),
    "no port": checked(b"\1" + boot_of(0) + b"10.0.0.1"),
    "no host": checked(b"\1" + boot_of(0) + b":7000"),
    "port too large": checked(b"\1" + boot_of(0) + b"10.0.0.1:70000"),
    "not ASCII": checked(b"\1" + boot_of(0) + b"\xff\xfe:7000"),
    "two lines": checked(b"\1" + boot_of(0) + b"10.0.0.1\n:7000"),
    "too long": checked(b"\1" + boot_of(0) + b"a" * 300 + b":7000"),
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())
def test_bad_values_are_passed_over(server, value, patience):
    async def story():
        async with Story(server.url) as at:
            await at.told()
            with server.client() as admin:
                for key in KEYS[::2]:
                    admin.set(hint_key(key, 1), value)
                admin.set(hint_key(KEYS[1], 0), value)
                admin.set(claim_key(KEYS[0]), value)
            assert await at.reader.locate(KEYS) == [(A,), (), *[(A,)] * (len(KEYS) - 2)]
            assert at.reader.stats().bad_values == len(KEYS[::2]) + 1
            assert await at.reader.claim(KEYS[0]) is None
            assert await at.a.claim(KEYS[0]) == READER, "it was overwritten"
            assert at.reader.stats().opened == 0

    play(story())


def test_a_huge_value_costs_no_more_than_the_budget(server):
    async def story():
        async with Story(server.url) as at:
            await at.told()
            server.ask("SET", hint_key(KEYS[0], 1), bytes(100_000_000))
            assert await in_time(at.reader.locate(KEYS[:1])) in ([(A,)], [()])
            server.flush()
            await at.heals()

    play(story())


def test_keys_of_another_type_are_bad_values(server, patience):
    async def story():
        async with Story(server.url) as at:
            await at.told()
            with server.client() as admin:
                for key in (hint_key(KEYS[0], 0), claim_key(KEYS[0]), claim_key(KEYS[1])):
                    admin.delete(key)
                    admin.rpush(key, "x")
            assert await at.reader.locate(KEYS[:2]) == [(), (A,)]
            await at.reader.renew([KEYS[1]])
            assert await at.reader.claim(KEYS[0]) is None
            assert await at.a.claim(KEYS[0]) == READER
            assert (at.reader.stats().bad_values, at.reader.stats().errors) == (1, {})

    play(story())


# -- the network ------------------------------------------------------------------------------------------------------


async def proxied(server, **given):
    proxy = await Proxy(server.port, **given).start()
    return proxy, f"redis{'s' if given else ''}://127.0.0.1:{proxy.port}"


def test_redis_is_slow(server, lines):
    async def story():
        proxy, url = await proxied(server)
        async with Story(url) as at:
            await at.told()
            proxy.delay = lambda: 0.1
            await at.breaks()
            await until(lambda: at.reader.stats().errors.get("timeout", 0) >= 3)
            assert (at.reader.stats().open, at.reader.stats().opened) == (True, 1)
            proxy.delay = lambda: 0.0
            await at.heals()
            assert len(lines("WARNING")) == at.reader.stats().opened + at.a.stats().opened
        await proxy.end()

    play(story())


HALF = {
    "reset": lambda piece: None,
    "half a reply": lambda piece: piece[: len(piece) // 2],
    "no Redis": lambda piece: b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "nothing": lambda piece: b"",
}


@pytest.mark.parametrize("change", HALF.values(), ids=HALF.keys())
def test_replies_are_spoilt(server, change):
    async def story():
        proxy, url = await proxied(server)
        async with Story(url) as at:
            await at.told()
            proxy.change = change
            await at.breaks()
            proxy.change = lambda piece: piece
            await at.heals()
        await proxy.end()

    play(story())


def test_nobody_reads_anothers_reply(server):
    """Concurrent callers who all ask for different things; many give up, and some replies come too late."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    pick = random.Random(seed)

    async def story():
        proxy, url = await proxied(server)
        holders = [Holder(f"10.1.{i}.1:7000", boot_of(i)) for i in range(40)]
        keys = [keys_of(f"holder {i}", 70) for i in range(40)]
        with server.client() as admin:
            for holder, theirs in zip(holders, keys, strict=True):
                for key in theirs:
                    admin.set(hint_key(key, 0), encode(holder), ex=int(HINT_S))
                admin.set(claim_key(theirs[0]), encode(holder))
        counts = {"right": 0, "missed": 0, "cancelled": 0}
        async with Story(url) as at:
            proxy.delay = lambda: pick.choice([0, 0, 0.001, 0.003, 0.01])

            async def ask(i):
                if pick.random() < 0.7:
                    right, missed = [(holders[i],)] * 70, [()] * 70
                    asking = asyncio.create_task(at.reader.locate(keys[i]))
                else:
                    right, missed = holders[i], None
                    asking = asyncio.create_task(at.reader.claim(keys[i][0]))
                if pick.random() < 0.4:
                    await asyncio.sleep(pick.random() * 0.01)
                    asking.cancel()
                try:
                    answer = await asking
                except asyncio.CancelledError:
                    counts["cancelled"] += 1
                    return
                assert answer in (right, missed)
                counts["right" if answer == right else "missed"] += 1

            end = time.monotonic() + 3

            async def ask_for_ever():
                while time.monotonic() < end:
                    await ask(pick.randrange(40))
                    if at.reader.stats().open:
                        await asyncio.sleep(0.01)

            async def be_late_at_times():
                while time.monotonic() < end:
                    await asyncio.sleep(0.3)
                    proxy.delay = lambda: 0.07
                    await asyncio.sleep(0.03)
                    proxy.delay = lambda: pick.choice([0, 0, 0.001, 0.003, 0.01])

            await asyncio.gather(be_late_at_times(), *(ask_for_ever() for _ in range(8)))
            stats = at.reader.stats()
            print(counts, stats)
            assert min(counts.values()) > 10
            assert stats.bad_values == 0
            assert stats.errors["timeout"] > 0
            proxy.delay = lambda: 0.0
            await at.heals()
            for i in range(40):
                assert await at.reader.locate(keys[i]) == [(holders[i],)] * 70
        await proxy.end()

    play(story())


def test_a_call_that_is_cut_off_takes_its_connection_along(server):
    """What redis-py does in this version, and what we do about it."""

    async def story():
        proxy, url = await proxied(server)
        with server.client() as admin:
            admin.mset({f"k{i}": f"v{i}" for i in range(100)})
        pipe = await connect(parse_redis_url(url))
        assert isinstance(pipe, ServerPipe)
        cut_off = 0
        for i in range(0, 100, 2):
            before = proxy.connections
            proxy.delay = lambda: 0.02
            asking = asyncio.create_task(pipe.run([["GET", f"k{i}"], ["GET", "k0"]]))
            await asyncio.sleep(0.0002 * i)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            cut_off += asking.cancelled()
            proxy.delay = lambda: 0.0
            assert await pipe.run([["GET", f"k{i + 1}"]]) == [f"v{i + 1}".encode()]
            assert proxy.connections - before == asking.cancelled()
        assert cut_off > 25
        await pipe.close()
        await proxy.end()

    play(story())


def test_cancelled_callers_cost_no_connection(server, patience):
    async def story():
        proxy, url = await proxied(server)
        async with Story(url) as at:
            await at.told()
            await until(at.finds)
            proxy.delay = lambda: 0.005
            before = proxy.connections
            for _ in range(30):
                asking = asyncio.create_task(at.reader.locate(KEYS))
                await asyncio.sleep(0.001)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                assert asking.cancelled()
                await until(at.finds)
            assert proxy.connections - before <= 2, "there were up to three calls at once"
            assert at.reader.stats().opened == 0
        await proxy.end()

    play(story())


def test_a_process_that_is_late_does_not_blame_redis(server):
    async def story():
        async with Story(server.url) as at:
            await at.told()
            asking = asyncio.create_task(at.reader.locate(KEYS))
            for _ in range(4):  # until it has asked
                await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251  the loop stands still
            assert await asking in ([()] * len(KEYS), [(A,)] * len(KEYS))
            assert at.reader.stats().opened == 0
            await until(at.finds)

    play(story())


def test_more_callers_than_connections(server, patience):
    """They take turns."""

    async def story():
        proxy, url = await proxied(server)
        async with Story(url) as at:
            await at.told()
            await until(at.finds)
            before = proxy.connections
            proxy.delay = lambda: 0.02
            answers = await asyncio.gather(*(at.reader.locate(KEYS[i : i + 1]) for i in range(100)))
            assert answers == [[(A,)]] * 100
            assert proxy.connections - before == CALLS_AT_ONCE - 1
        await proxy.end()

    play(story())


def test_who_waits_too_long_for_his_turn_does_not_blame_redis(server):
    async def story():
        async with Story(server.url) as at:
            await at.told()
            for _ in range(CALLS_AT_ONCE):
                await at.reader._at_once.acquire()
            assert await in_time(at.reader.locate(KEYS)) == [()] * len(KEYS)
            assert (at.reader.stats().errors, at.reader.stats().opened) == ({"busy": 1}, 0)
            for _ in range(CALLS_AT_ONCE):
                at.reader._at_once.release()
            await until(at.finds)

    play(story())


# -- several servers --------------------------------------------------------------------------------------------------


@LONG
def test_sentinel_fails_over():
    sentinels = Sentinels()

    async def story():
        async with Story(sentinels.url) as at:
            await at.told()
            await until(at.finds)
            sentinels.sentinels[0].pause()
            sentinels.master.kill()
            await at.misses()
            await at.heals()
            assert sentinels.replica.role() == "master"
            sentinels.sentinels[0].resume()
            sentinels.master.start()
            await until(lambda: sentinels.master.role() == "slave")
            await at.heals()
            await until(sentinels.fail_over)
            await until(lambda: sentinels.master.role() == "master", 30)
            await at.heals(keys_of("after", 100))
            assert sentinels.master.ask("DBSIZE") >= 100

    try:
        play(story())
    finally:
        sentinels.end()


@LONG
def test_a_node_of_a_cluster_is_killed():
    cluster = Cluster()

    async def story():
        async with Story(cluster.url) as at:
            keys = keys_of("spread", 64 * 12)
            await at.told(keys)
            await until(lambda: at.finds(keys))
            for server in cluster.servers:
                server.kill()
                answer = await in_time(at.reader.locate(keys))
                assert 0 < answer.count((A,)) < len(keys), "the other nodes' segments are answered"
                await at.breaks()
                server.start()
                await until(cluster.is_whole)
                await at.heals(keys)

    try:
        play(story())
    finally:
        cluster.end()


@LONG
def test_slots_of_a_cluster_move(patience):
    """A segment in the middle of its move may be a miss, but that is no fault; afterwards it is found elsewhere."""
    cluster = Cluster()

    async def story():
        async with Story(cluster.url) as at:
            keys = keys_of("spread", 64 * 12)
            await at.told(keys)
            for first in keys[::64]:
                segment = [key for key in keys if key.anchor == first.anchor]
                there = cluster.begin_move(hint_key(first, 0))
                assert set(await at.reader.locate(segment)) <= {(A,), ()}
                assert await at.a.claim(first) is None
                cluster.end_move(hint_key(first, 0), there)
                await until(lambda segment=segment: at.finds(segment))
                assert await at.a.claim(first) is None
                assert await at.reader.claim(first) == A
            await until(lambda: at.finds(keys))
            assert at.reader.stats().errors.keys() == {"moving"}
            assert (at.reader.stats().opened, at.a.stats().opened) == (0, 0)

    try:
        play(story())
    finally:
        cluster.end()


@LONG
def test_one_node_of_a_cluster_is_not_the_cluster():
    """It redirects everything that it does not have, and that is not followed: the URL is wrong, and we say so."""
    cluster = Cluster()

    async def story():
        async with Story(cluster.servers[0].url) as at:
            for _ in range(20):
                assert not any(await at.reader.locate(keys_of("spread", 64 * 12)))
                await asyncio.sleep(0.1)
            assert at.reader.stats().errors.keys() == {"cluster"}
            assert "redis+cluster:" in at.reader.stats().last_fault

    try:
        play(story())
    finally:
        cluster.end()
