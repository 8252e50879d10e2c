"""bench/store.py: blocks from another node over TCP on loopback, verified at their destination, against the bytes
alone.

The limit is raw TCP: a process that sends the same bytes by sendmsg, and a receiver that takes them by recv_into,
straight to their destination, over as many connections as the nodes use. Beside it a Redis that has the same
blocks as values, read by redis-py's MGET, and a Mooncake Store where there is one, read by batch_get_into.
"""

import asyncio
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import redis
from door_servers import free_ports
from store_ground import TENANT, Meaning, Seen, StoreNode, chain, store_node
from store_local import Shape, room
from store_mooncake import Mooncake, find, mooncake
from store_redis import redis_server

from kvferry.common.hashing import KEY_BYTES, Span
from kvferry.common.store_api import Payload

SETTINGS = (  # with the connections by which the nodes fetch
    (Shape("", 64, 2 * 2**20, 20, 8), 1),
    (Shape("_2_connections", 64, 2 * 2**20, 20, 8), 2),
    (Shape("_64k", 256, 64 * 2**10, 60, 20), 1),
)
CHAINS = 4  # that an arena holds
FIGURES = {
    "remote_pull_over_raw_tcp": Meaning(">= 0.90", "64 blocks of 2 MiB from another node, verified"),
    "remote_sealed_pull_over_raw_tcp": Meaning(">= 0.85", "the same, opened"),
    "remote_pull_over_redis": Meaning(">= 4", "the same, plain, against redis-py's MGET of the blocks"),
    "remote_pull_over_mooncake": Meaning(">= 2", "the same, against Mooncake Store's batch_get_into over TCP"),
    "remote_pull_2_connections_over_raw_tcp": Meaning("", "64 blocks of 2 MiB, two connections against two"),
    "remote_sealed_pull_2_connections_over_raw_tcp": Meaning("", "the same, opened"),
    "remote_pull_64k_over_raw_tcp": Meaning("", "256 blocks of 64 KiB"),
    "remote_sealed_pull_64k_over_raw_tcp": Meaning("", "the same, opened"),
}


class Raw(NamedTuple):
    """A process that sends the bytes of a shape, or of a part of it, to whoever sends it a byte."""

    process: psutil.Process
    port: int


def measure(quick: bool, mooncake_python: Path | None = None) -> dict[str, float | None]:
    """`mooncake_python`: an interpreter that has mooncake; ours, if none is given."""
    figures: dict[str, float | None] = {}
    installed = find(mooncake_python)
    for shape, connections in SETTINGS:
        slots, (one, two, third) = CHAINS * shape.blocks, free_ports(3)
        with tempfile.TemporaryDirectory(prefix="store-") as folder:
            secret = Path(folder) / "secret"
            secret.touch(0o600)
            secret.write_text(os.urandom(32).hex())
            listen = [(f"--listen=127.0.0.1:{port}", f"--peer-secret-file={secret}") for port in (one, two)]
            with (
                store_node(shape.block_bytes, slots, *listen[0], f"--connections={connections}") as near,
                store_node(shape.block_bytes, slots, *listen[1]) as far,
                raw_sender(shape) as raw,
                redis_server(third) as server,
                mooncake(installed, shape.blocks, shape.block_bytes) as rival,
            ):
                bench = Bench(shape, near, far, f"127.0.0.1:{two}", raw, connections, third, server, rival)
                figures |= asyncio.run(bench.run(shape.quick_rounds if quick else shape.rounds))
    return figures


class Bench:
    """`near` is the node of who pulls, `far` has the blocks, and is at `holder`. `rival` is None where there is no
    mooncake."""

    def __init__(
        self, shape: Shape, near: StoreNode, far: StoreNode, holder: str, raw: Raw, connections: int, port: int,
        server: psutil.Process, rival: Mooncake | None,
    ):  # fmt: skip
        self._shape, self._holder, self._rival = shape, holder, rival
        self._reader, self._writer = near.client(), far.client()
        self._source, self._room = room(shape), room(shape)
        for block in self._source:
            block[:] = np.frombuffer(os.urandom(shape.block_bytes), dtype=np.uint8)
        self._key = os.urandom(KEY_BYTES)
        self._lanes = [socket.create_connection(("127.0.0.1", raw.port)) for _ in range(connections)]
        self._threads = ThreadPoolExecutor(connections)
        self._redis = redis.Redis(port=port)
        self._values = [f"block-{i}" for i in range(shape.blocks)]
        self._redis.mset({name: block.tobytes() for name, block in zip(self._values, self._source, strict=True)})
        self._seen = Seen(near.process, far.process, raw.process, server, *(rival.processes if rival else ()))

    async def run(self, rounds: int) -> dict[str, float | None]:
        for client in (self._reader, self._writer):
            await client.start()
        for _ in range(CHAINS):  # until every slot has been in use
            await self._round(0)
        self._seen.costs.clear()
        for number in range(rounds):
            await self._round(number)
        for client in (self._reader, self._writer):
            await client.close()
        for lane in self._lanes:
            lane.close()
        self._redis.close()
        return self._figures()

    async def _round(self, number: int) -> None:
        spans = {"": chain(self._shape.blocks), "sealed_": chain(self._shape.blocks)}
        for kind, span in spans.items():
            await self._publish(span, self._key if kind else None)
        work: list[tuple[str, Callable[[], Awaitable[int]]]] = [
            (f"remote_{kind}pull", lambda kind=kind, span=span: self._pull(span, self._key if kind else None))
            for kind, span in spans.items()
        ]
        work += [("raw_tcp", self._raw), ("redis", self._mget)]
        if self._rival:
            work.append(("mooncake", self._rival.get))
        turn = number % len(work)
        for name, one in work[turn:] + work[:turn]:
            self._room[0][:] = self._room[-1][:] = 0
            await self._seen.during(name, one(), self._shape.blocks)
            if name.startswith("remote"):
                self._check()

    def _check(self) -> None:
        if not all(np.array_equal(got, sent) for got, sent in zip(self._room, self._source, strict=True)):
            raise SystemExit("what was pulled is not what was published")

    async def _publish(self, span: Span, key: bytes | None) -> None:
        chained = zip(span.names, (span.parent, *span.names), self._source, strict=False)
        payloads = [Payload(name, parent, block.data) for name, parent, block in chained]
        reservation = await self._writer.reserve(span, tenant=TENANT)
        if await self._writer.publish(reservation, payloads, key) != len(span):
            raise SystemExit("not all blocks could be published")
        await self._writer.release(reservation.lease)

    async def _pull(self, span: Span, key: bytes | None) -> int:
        match = await self._reader.lookup(span, tenant=TENANT, holder=self._holder)
        good = await self._reader.pull(match, [block.data for block in self._room[: len(match)]], key)
        return good if await self._reader.release(match.lease) else 0

    async def _raw(self) -> int:
        """The same bytes, a thread for each connection."""
        loop, count = asyncio.get_running_loop(), len(self._lanes)
        step = len(self._room) // count
        jobs = [
            loop.run_in_executor(self._threads, receive, lane, self._room[i * step : (i + 1) * step], i, count)
            for i, lane in enumerate(self._lanes)
        ]
        return sum(await asyncio.gather(*jobs))

    async def _mget(self) -> int:
        loop = asyncio.get_running_loop()
        values = await loop.run_in_executor(self._threads, self._redis.mget, self._values)
        return sum(len(value) == self._shape.block_bytes for value in values)

    def _figures(self) -> dict[str, float | None]:
        shape, seen = self._shape, self._seen
        figures: dict[str, float | None] = {}
        for ours, theirs, called in (
            ("remote_pull", "raw_tcp", "raw_tcp"),
            ("remote_sealed_pull", "raw_tcp", "raw_tcp"),
            ("remote_pull", "redis", "redis"),
            ("remote_pull", "mooncake", "mooncake"),
        ):
            if theirs not in seen.costs:
                figures[f"{ours}{shape.suffix}_over_{called}"] = None
                continue
            figures[f"{ours}{shape.suffix}_over_{called}"] = seen.speed_over(ours, theirs)
            for name, told in ((ours, ours + shape.suffix), (theirs, f"{ours}{shape.suffix}_{called}")):
                figures[f"{told}_gb_per_s"] = seen.gb_per_s(name, shape.size)
                figures[f"{told}_cpu_s_per_gb"] = seen.cpu_s_per_gb(name, shape.size)
        return figures


def receive(lane: socket.socket, room: Sequence[np.ndarray], part: int, parts: int) -> int:
    lane.sendall(bytes((part, parts)))
    for block in room:
        if lane.recv_into(block, 0, socket.MSG_WAITALL) != len(block):
            raise EOFError("the raw sender closed the connection")
    return len(room)


@contextmanager
def raw_sender(shape: Shape) -> Iterator[Raw]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=send, args=(theirs, shape), daemon=True)
    process.start()
    try:
        yield Raw(psutil.Process(process.pid), ours.recv())
    finally:
        process.terminate()
        process.join()


def send(parent: "multiprocessing.connection.Connection", shape: Shape) -> None:
    """Answer each connection in a thread of its own."""
    blocks = room(shape)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as threads:
        parent.send(listener.getsockname()[1])
        while True:
            threads.submit(answer, listener.accept()[0], blocks)


def answer(lane: socket.socket, blocks: Sequence[np.ndarray]) -> None:
    while asked := lane.recv(2, socket.MSG_WAITALL):
        part, parts = asked
        step = len(blocks) // parts
        left = [block.data for block in blocks[part * step : (part + 1) * step]]
        while left:
            sent = lane.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]
