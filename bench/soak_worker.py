"""A worker of bench/soak.py: `python soak_worker.py JOB_AS_JSON`.

Several streams use one `StoreClient`, each at random: publish what of a chain is not there, pull, peek, and now and
then end in the middle. Lines on stdin: `pause` (answered once no stream does anything), `go`, `erase TENANT`,
`generations N N ...`. On stdout: `Told`, as JSON.
"""

import asyncio
import os
import random
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Coroutine
from pathlib import Path

import msgspec
import numpy as np
from soak_ground import BLOCK_BYTES, CHAINS, LONGEST, SEGMENTS, TENANTS, Chain, Job, Pool, chain_of

from kvferry.common.config import LogConfig
from kvferry.common.hashing import BlockName
from kvferry.common.store_api import Claim, MissReason, Payload
from kvferry.common.telemetry import setup_logging
from kvferry.kvstore.client import StoreClient

NICE = 5  # the machine is the workers' as far as the nodes and Redis leave it to them, as with real ones
TELL_S = 0.5
MOST_S = 30.0  # a piece of work that takes longer hangs
CANCELLED = 0.1  # of all work ends in the middle,
CANCEL_WITHIN_S = 0.15  # at a moment within this
OWN = 0.3  # of all pulls are of what this worker published lately
HOLDER = 0.3  # name a node that may have it, right or wrong
WAIT = 0.3  # wait for others, up to
WAIT_S = 1.0
ALONE_S = 0.05  # from one piece of work to the next while there is no store: everything is computed
FILLED = 0.5  # of all chains that were not there whole are published by who pulled
PARTS = 4  # a chain is published in so many parts at most, as a prefill computes it
GLIMPSE = 4096  # one byte of so many is spoilt before a pull


class Told(msgspec.Struct):
    """`counts`: since the worker's start. `answer`: to a command; empty otherwise."""

    counts: dict[str, float]
    errors: list[str] = []
    answer: str = ""


class Worker:
    """One process's streams."""

    def __init__(self, job: Job, client: StoreClient):
        self._job, self._client = job, client
        self._pool = Pool(job.pool)
        self._generations = list(job.generations)
        self._lately: deque[tuple[int, int, int]] = deque(maxlen=8)
        self._going = asyncio.Event()
        self._going.set()
        self._busy = 0
        self._idle = asyncio.Event()
        self._counts: Counter[str] = Counter()
        self._slowest = 0.0
        self._errors: list[str] = []

    async def run(self) -> None:
        """Until stdin closes."""
        rooms = [np.zeros((LONGEST, BLOCK_BYTES), dtype=np.uint8) for _ in range(self._job.streams)]
        for room in rooms:
            room[:] = 1
        tasks = [asyncio.create_task(self._stream(random.Random(f"{self._job.seed}/{i}"), room))
                 for i, room in enumerate(rooms)]  # fmt: skip
        tasks.append(asyncio.create_task(self._tell_for_ever()))
        obeying = asyncio.create_task(self._obey())
        done, _ = await asyncio.wait([*tasks, obeying], return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, obeying):
            task.cancel()
        await asyncio.gather(*tasks, obeying, return_exceptions=True)
        for task in done:
            task.result()

    async def _obey(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := (await reader.readline()).decode():
            match line.split():
                case ["pause"]:
                    self._going.clear()
                    while self._busy:
                        self._idle.clear()
                        await self._idle.wait()
                case ["go"]:
                    self._going.set()
                case ["erase", tenant]:
                    await self._client.erase(tenant)
                case ["generations", *numbers]:
                    self._generations = [int(number) for number in numbers]
            self._tell(line.split()[0])

    async def _tell_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            self._tell()

    def _tell(self, answer: str = "") -> None:
        client = self._client
        counts = {**self._counts, "slowest_s": self._slowest, "bad": client.bad_blocks, "connects": client.connects,
                  "published": client.published_bytes // BLOCK_BYTES}  # fmt: skip
        sys.stdout.write(msgspec.json.encode(Told(counts, self._errors, answer)).decode() + "\n")
        sys.stdout.flush()
        self._errors = []

    # -- what a stream does --------------------------------------------------------------------------------------

    async def _stream(self, rng: random.Random, room: np.ndarray) -> None:
        while True:
            await self._going.wait()
            self._busy += 1
            started = time.monotonic()
            try:
                await self._do(rng, room)
            finally:
                self._busy -= 1
                self._idle.set()
            self._slowest = max(self._slowest, time.monotonic() - started)
            self._counts["works"] += 1
            if not self._client.connected:
                await asyncio.sleep(ALONE_S)

    async def _do(self, rng: random.Random, room: np.ndarray) -> None:
        """One piece of work. Whatever it raises is an error, and so is not ending."""
        what = rng.choices(("fill", "pull", "peek", "stats"), (45, 45, 8, 2))[0]
        doing = asyncio.create_task(self._work(what, rng, room))
        cancel = rng.random() < CANCELLED
        await asyncio.wait([doing], timeout=rng.uniform(0, CANCEL_WITHIN_S) if cancel else MOST_S)
        if not doing.done():
            if cancel:
                self._counts["cancelled"] += 1
            else:
                self._errors.append(f"a {what} took more than {MOST_S:g} s")
            doing.cancel()
            await asyncio.wait([doing])
        if not doing.cancelled() and (error := doing.exception()) is not None:
            self._errors.append("".join(traceback.format_exception(error)))

    def _work(self, what: str, rng: random.Random, room: np.ndarray) -> Coroutine[None, None, None]:
        tenant, number = rng.randrange(TENANTS), int(CHAINS * rng.random() ** 2)
        first, end = 0, rng.randint(8, LONGEST)
        if what == "pull" and self._lately and rng.random() < OWN:
            tenant, number, end = rng.choice(self._lately)
        if what != "fill" and rng.random() < 0.2:  # behind a hole, as it were
            first = rng.randrange(end)
        chain = chain_of(tenant, self._generations[tenant], number)
        wait_s = rng.uniform(0, WAIT_S) if rng.random() < WAIT else 0.0
        match what:
            case "fill":
                self._lately.append((tenant, number, end))
                return self._fill(chain, end, wait_s, rng.randint(1, PARTS))
            case "pull":
                holder = rng.choice(self._job.nodes) if rng.random() < HOLDER else ""
                return self._pull(chain, first, end, wait_s, holder, room, rng.random() < FILLED)
            case "peek":
                return self._peek(chain, first, end)
        return self._stats()

    async def _fill(self, chain: Chain, end: int, wait_s: float, parts: int) -> None:
        """Lease what is there, publish what is not and nobody else computes."""
        leases: list[int] = []
        client, span = self._client, chain.span(0, end)
        try:
            match = await client.lookup(span, tenant=chain.tenant, wait_s=wait_s)
            leases.append(match.lease)
            if (here := len(match.blocks)) == end:
                return
            reservation = await client.reserve(span.from_(here), tenant=chain.tenant)
            leases.append(reservation.lease)
            ours = [here + i for i, claim in enumerate(reservation.claims) if claim is Claim.GRANTED]
            self._counts.update([f"claims_{claim.value}" for claim in reservation.claims])
            step = -(-len(ours) // parts)
            for start in range(0, len(ours), step or 1):
                part = ours[start : start + step]
                there = await client.publish(reservation, [self._payload(chain, i) for i in part], chain.seal)
                self._counts["dropped"] += len(part) - there
        finally:
            releases = [asyncio.create_task(client.release(lease)) for lease in leases if lease]
            if releases:
                await asyncio.wait(releases)

    async def _pull(
        self, chain: Chain, first: int, end: int, wait_s: float, holder: str, room: np.ndarray, fill: bool
    ) -> None:
        client, span = self._client, chain.span(first, end)
        match = await client.lookup(span, tenant=chain.tenant, wait_s=wait_s, holder=holder)
        held = False
        try:
            room[: len(match), ::GLIMPSE] = 0  # so that what an earlier pull left is no right answer
            good = await client.pull(match, [block.data for block in room[: len(match)]], chain.seal)
        finally:
            if match.lease:
                held = await client.release(match.lease)
        if match.miss is not MissReason.STORE_UNREACHABLE:
            self._counts["asked"] += end - first
        self._counts[f"miss_{match.miss.value}" if match.miss else "whole"] += 1
        self._counts["matched"] += len(match)
        if not held:
            self._counts["lapsed"] += good
            good = 0
        self._counts["pulled"] += good
        self._counts["pulled_coming"] += max(0, good - len(match.blocks))
        for i, (got, name) in enumerate(zip(room[:good], span.names, strict=False)):
            if not np.array_equal(got.view(np.uint64), self._pool.block(name).view(np.uint64)):
                self._errors.append(f"wrong bytes in block {first + i} of a chain of {chain.tenant}")
        if good < end - first and fill:
            await self._fill(chain, end, 0.0, 1)

    async def _peek(self, chain: Chain, first: int, end: int) -> None:
        match = await self._client.lookup(chain.span(first, end), tenant=chain.tenant, lease=False)
        if match.lease:
            self._errors.append("a look-up that asked for no lease got one")

    async def _stats(self) -> None:
        stats = await self._client.stats()
        if stats and stats.free + stats.writing + stats.committed + stats.quarantined != stats.slots:
            self._errors.append(f"slots are not a partition: {stats}")

    def _payload(self, chain: Chain, i: int) -> Payload:
        name: BlockName = chain.names[i]
        return Payload(name, chain.names[i - 1] if i else chain.root, self._pool.block(name).data)


async def main() -> None:
    os.nice(NICE)
    job = msgspec.json.decode(sys.argv[1], type=Job)
    client = StoreClient(Path(job.socket), BLOCK_BYTES, SEGMENTS, "soak")
    await client.start()
    try:
        await Worker(job, client).run()
    finally:
        await client.close()


if __name__ == "__main__":
    setup_logging("worker", LogConfig(log_level="WARNING", log_format="json"))
    asyncio.run(main())
