"""bench/store.py: the directory in a real redis-server on loopback, with a thousand blocks in it and with a million.

The limit is the same keys asked for with no Python around but hiredis, on a blocking socket; the peer is redis-py's own
pipeline.
"""

import asyncio
import os
import random
import socket
import time
from collections.abc import Sequence
from statistics import median, quantiles

import hiredis
import redis.asyncio
from door_servers import free_ports
from store_ground import Meaning
from store_redis import redis_server

from kvferry.common.hashing import NAME_BYTES, SEGMENT, BlockName
from kvferry.kvstore import redis_directory
from kvferry.kvstore.directory import HINT_S, Holder, Key, place_of
from kvferry.kvstore.redis_directory import BATCH, RedisDirectory
from kvferry.kvstore.redis_entries import encode, hint_key, segments
from kvferry.kvstore.redis_target import parse_redis_url

PREFIX = 512  # blocks
FEW = 1024
MANY = 10**6
ANNOUNCED = 50_000
HOLDER = Holder("192.168.100.100:7000", os.urandom(16))
READER = Holder("192.168.100.101:7000", os.urandom(16))
PATIENCE_S = 60.0
FIGURES = {
    "lookup_redis_us": Meaning("<= 3000", "who has 512 blocks, all of which somebody has; a thousand in Redis; median"),
    "lookup_redis_us_million": Meaning("<= 3000", "the same with a million blocks in Redis"),
    "lookup_redis_p99_us_million": Meaning("", "the 99th percentile"),
    "lookup_redis_cpu_us": Meaning("", "CPU time of the process that asks"),
    "lookup_redis_over_mget": Meaning("", "time, over hiredis on a blocking socket; a million"),
    "lookup_redis_over_pipeline": Meaning("", "time, over redis-py's own pipeline; a million"),
    "mget_us": Meaning("", "hiredis on a blocking socket; a thousand"),
    "mget_us_million": Meaning("", "hiredis on a blocking socket; a million"),
    "pipeline_us_million": Meaning("", "redis-py's own pipeline; a million"),
    "announce_per_s": Meaning("", "blocks announced in a second"),
    "announce_over_set": Meaning("", "time, over as many SETs in as large pieces by hiredis"),
    "set_per_s": Meaning("", "the latter in a second"),
    "redis_bytes_per_block": Meaning("", "Redis's memory for a block that one node announced"),
}


class Bare:
    """Redis with nothing around but hiredis."""

    def __init__(self, port: int):
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader(notEnoughData=Ellipsis)

    def run(self, packed: bytes, count: int) -> list[object]:
        self._socket.sendall(packed)
        replies: list[object] = []
        while len(replies) < count:
            if (reply := self._reader.gets()) is Ellipsis:
                self._reader.feed(self._socket.recv(65536))
            elif isinstance(reply, Exception):
                raise reply
            else:
                replies.append(reply)
        return replies

    def tell(self, keys: Sequence[Key]) -> None:
        place, value, ms = place_of(HOLDER.address), encode(HOLDER), int(HINT_S * 1000)
        for i in range(0, len(keys), BATCH):
            batch = keys[i : i + BATCH]
            commands = [hiredis.pack_command(("SET", hint_key(key, place), value, "PX", ms)) for key in batch]
            self.run(b"".join(commands), len(commands))

    def memory(self) -> int:
        (info,) = self.run(hiredis.pack_command(("INFO", "memory")), 1)
        return int(info.split(b"used_memory:")[1].split()[0])

    def close(self) -> None:
        self._socket.close()


def chains(count: int) -> list[list[Key]]:
    """Segments, of so many blocks in all."""
    fresh = os.urandom(NAME_BYTES * count)
    names = [BlockName(fresh[i : i + NAME_BYTES]) for i in range(0, len(fresh), NAME_BYTES)]
    return [[Key(names[i], name) for name in names[i : i + SEGMENT]] for i in range(0, count, SEGMENT)]


def measure(quick: bool) -> dict[str, float]:
    (port,) = free_ports(1)
    with redis_server(port):
        return asyncio.run(measure_redis(port, 300 if quick else 2000))


async def measure_redis(port: int, times: int) -> dict[str, float]:
    redis_directory.BUDGET_S = PATIENCE_S  # each call is timed; none is to be given up
    bare, peer = Bare(port), redis.asyncio.Redis(port=port, protocol=2)
    target = parse_redis_url(f"redis://127.0.0.1:{port}")
    reader, holder = await RedisDirectory.open(target, READER), await RedisDirectory.open(target, HOLDER)
    told = chains(FEW)
    bare.tell([key for segment in told for key in segment])
    few = await measure_lookups(reader, bare, peer, told, times)
    before = bare.memory()
    more = chains(MANY - FEW)
    bare.tell([key for segment in more for key in segment])
    bytes_per_block = (bare.memory() - before) / (MANY - FEW)
    many = await measure_lookups(reader, bare, peer, told + more, times)
    announced, bare_set = await measure_announcing(holder, bare, ANNOUNCED)
    for directory in (reader, holder):
        if errors := directory.stats().errors:
            raise SystemExit(f"the directory failed: {errors}")
        await directory.close()
    await peer.aclose()
    bare.close()
    middle = {name: median(took) * 1e6 for name, took in many.items()}
    return {
        "lookup_redis_us": median(few["ours"]) * 1e6,
        "lookup_redis_us_million": middle["ours"],
        "lookup_redis_p99_us_million": quantiles(many["ours"], n=100)[-1] * 1e6,
        "lookup_redis_cpu_us": middle["cpu"],
        "lookup_redis_over_mget": median(a / b for a, b in zip(many["ours"], many["bare"], strict=True)),
        "lookup_redis_over_pipeline": median(a / b for a, b in zip(many["ours"], many["peer"], strict=True)),
        "mget_us": median(few["bare"]) * 1e6,
        "mget_us_million": middle["bare"],
        "pipeline_us_million": middle["peer"],
        "announce_per_s": announced,
        "announce_over_set": bare_set / announced,
        "set_per_s": bare_set,
        "redis_bytes_per_block": bytes_per_block,
    }


async def measure_lookups(
    reader: RedisDirectory, bare: Bare, peer: redis.asyncio.Redis, told: Sequence[list[Key]], times: int
) -> dict[str, list[float]]:
    """Seconds that each took for the same blocks, other ones each time. They take turns in being the first to ask: who
    comes after finds Redis's memory in its caches."""
    pick = random.Random(0)
    took: dict[str, list[float]] = {name: [] for name in ("ours", "cpu", "bare", "peer")}

    async def ours() -> bool:
        cpu = time.process_time()
        found = await reader.locate(keys)
        took["cpu"].append(time.process_time() - cpu)
        return found == [(HOLDER,)] * PREFIX

    async def limit() -> bool:
        return all(len(reply) == 2 * SEGMENT for reply in bare.run(packed, len(asked)))

    async def pipeline() -> bool:
        pipeline = peer.pipeline(transaction=False)
        for segment in asked:
            pipeline.mget(segment)
        return all(len(reply) == 2 * SEGMENT for reply in await pipeline.execute())

    turns = [("ours", ours), ("bare", limit), ("peer", pipeline)]
    for i in range(times):
        keys = [key for segment in pick.sample(told, PREFIX // SEGMENT) for key in segment]
        asked = segments(keys)
        packed = b"".join([hiredis.pack_command(("MGET", *segment)) for segment in asked])
        for name, ask in turns[i % 3 :] + turns[: i % 3]:
            begun = time.perf_counter()
            right = await ask()
            took[name].append(time.perf_counter() - begun)
            if not right:
                raise SystemExit("not every block was found")
    return took


async def measure_announcing(holder: RedisDirectory, bare: Bare, count: int) -> tuple[float, float]:
    """Blocks a second: ours, and with nothing around."""
    ours, theirs = [[key for segment in chains(count) for key in segment] for _ in range(2)]
    begun = time.perf_counter()
    await holder.announce(ours)
    while holder.stats().announced < count:  # noqa: ASYNC110  nobody else needs an event for it
        await asyncio.sleep(0.001)
    took = time.perf_counter() - begun
    begun = time.perf_counter()
    bare.tell(theirs)
    return count / took, count / (time.perf_counter() - begun)


if __name__ == "__main__":
    for name, value in measure(quick=True).items():
        print(f"{name:30} {value:10.4g}  {FIGURES[name].target:8}  {FIGURES[name].what}")
