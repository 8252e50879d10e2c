"""Three store nodes at full load for minutes, with a Redis, while any of them is killed at any moment.

    python bench/soak.py [--minutes 10] [--seed N] [--json FILE]

Several workers at each node publish chains, pull their own and others', through the directory and by holder, wait,
cancel in the middle and erase; arenas have room for a part of it. Every block that is pulled is compared with what is
published under its name. Nodes, Redis and workers are killed and started again at random moments; the first node, and
each node's first worker, live through all of it. Every `LOADED_S` everything comes to rest: then nothing may be held
any more, the nodes' indexes check themselves, and memory and descriptors are measured.

Ends with 1 if there was an error (an exception from any verb, wrong bytes, a block that failed verification, an error
in a log, a process that ended by itself, something still held at rest), or if a process grew by more than `GROWTH_MIB`
or `GROWTH_FDS` between the first rest and the last.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from door_servers import free_ports
from soak_figures import Done, figures_of, grown, show
from soak_ground import TENANTS, Job, make_pool, pseudonym
from soak_processes import Node, Part, Redis, Worker

NODES, WORKERS, STREAMS = 3, 2, 2  # workers of a node, streams of a worker
WARM_S = 15.0  # before the first rest
LOADED_S = 20.0  # between two rests
BETWEEN_S = (1.0, 5.0)  # from one fault to the next
DOWN_S = (0.05, 2.0)
REST_S = 15.0  # so long after the last work, at most, something may still be held
QUIET_S = 2.0  # of rest; a node's index checks itself after one second of it
TELL_S = 5.0
FAULTS = {"kill a node": 4, "end a node": 1, "kill Redis": 2, "flush Redis": 1, "kill a worker": 4, "erase a tenant": 2}
MOST_TOLD = 20  # errors
OF_NODES = ("brought", "evicted", "late_commits", "bad_blocks")


class Soak:
    def __init__(self, seed: int, folder: Path):
        make_pool(folder / "pool", seed)
        secret = folder / "secret"
        secret.touch(0o600)
        secret.write_text(os.urandom(32).hex())
        redis_port, *ports = free_ports(1 + NODES)
        self._rng = random.Random(seed)
        self._generations = [0] * TENANTS
        self._erased: list[str] = []
        self.redis = Redis(folder, redis_port)
        self.nodes = [Node(number, folder, port, redis_port, secret) for number, port in enumerate(ports)]
        self.workers = [[self._worker(node, number, seed, folder) for number in range(WORKERS)] for node in self.nodes]
        self.errors: list[str] = []
        self.faults: Counter[str] = Counter()
        self.rests = 0
        self.loaded_s = 0.0
        self._loaded_at = 0.0

    def _worker(self, node: Node, number: int, seed: int, folder: Path) -> Worker:
        nodes = tuple(one.address for one in self.nodes)
        name = f"{node.name}-worker-{number}"
        return Worker(name, folder, Job(str(node.socket), str(folder / "pool"), f"{seed}/{name}", STREAMS, nodes, ()))

    @property
    def all_workers(self) -> list[Worker]:
        return [worker for workers in self.workers for worker in workers]

    @property
    def parts(self) -> list[Part]:
        return [self.redis, *self.nodes, *self.all_workers]

    async def run(self, minutes: float) -> None:
        await self._start()
        telling = asyncio.create_task(self._tell_for_ever())
        try:
            self._loaded_at = time.monotonic()
            end = self._loaded_at + minutes * 60
            await asyncio.sleep(WARM_S)
            await self._rest()
            while time.monotonic() < end:
                await self._load(LOADED_S)
                await self._rest()
        finally:
            telling.cancel()
            (outcome,) = await asyncio.gather(telling, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome
        await self._end()

    async def _start(self) -> None:
        await self.redis.start()
        await self.redis.until_ready()
        for node in self.nodes:
            await node.start()
            await node.watch()
        for node, workers in zip(self.nodes, self.workers, strict=True):
            await node.until_ready()
            for worker in workers:
                await worker.start(self._generations)

    async def _end(self) -> None:
        for worker in self.all_workers:
            await worker.end()
        for node in self.nodes:
            await node.stop()
            await node.close()
        self._gather_errors()
        await self.redis.kill()
        if bad := self.done()["bad_blocks"] + self.done()["bad"]:
            self.errors.append(f"{bad:.0f} blocks failed verification")

    # -- faults --------------------------------------------------------------------------------------------------

    async def _load(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (pause := self._rng.uniform(*BETWEEN_S)) < end - time.monotonic():
            await asyncio.sleep(pause)
            await self._fault(self._rng.choices(list(FAULTS), list(FAULTS.values()))[0])
        await asyncio.sleep(max(0.0, end - time.monotonic()))

    async def _fault(self, what: str) -> None:
        """Returns when what was killed is there again."""
        self.faults[what] += 1
        down_s = self._rng.uniform(*DOWN_S)
        node = self._rng.choice(self.nodes[1:])
        worker = self._rng.choice(self._rng.choice(self.workers)[1:])
        match what:
            case "kill a node" | "end a node":
                await node.stats()
                await (node.kill() if what == "kill a node" else node.stop())
                await asyncio.sleep(down_s)
                await node.start()
                await node.until_ready()
            case "kill Redis":
                await self.redis.kill()
                await asyncio.sleep(down_s)
                await self.redis.start()
                await self.redis.until_ready()
            case "flush Redis":
                await self.redis.flush()
            case "kill a worker":
                await worker.kill()
                await asyncio.sleep(down_s)
                await worker.start(self._generations)
            case "erase a tenant":  # which goes on, under the same names
                tenant = self._rng.randrange(TENANTS)
                await worker.tell(f"erase {pseudonym(tenant, self._generations[tenant])}")

    # -- at rest -------------------------------------------------------------------------------------------------

    async def _rest(self) -> None:
        """Everybody stops. Nothing may be held then, and of the tenant that is erased nothing is left."""
        await asyncio.gather(*[worker.tell("pause") for worker in self.all_workers])
        self.loaded_s += time.monotonic() - self._loaded_at
        tenant = self._rng.randrange(TENANTS)
        self._erased.append(pseudonym(tenant, self._generations[tenant]))
        self._generations[tenant] += 1
        for workers in self.workers:
            await workers[0].tell(f"erase {self._erased[-1]}")
        for node in self.nodes:
            await self._is_at_rest(node)
        await asyncio.sleep(QUIET_S)
        for part in self.parts:
            part.measure()
        self._gather_errors()
        self.rests += 1
        told = f"generations {' '.join(map(str, self._generations))}"
        for command in (told, "go"):
            await asyncio.gather(*[worker.tell(command) for worker in self.all_workers])
        self._loaded_at = time.monotonic()

    async def _is_at_rest(self, node: Node) -> None:
        deadline = time.monotonic() + REST_S
        while True:
            stats = await node.stats()
            held = stats is None or stats.leases or stats.reserved or stats.writing
            if not held or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        if stats is None:
            self.errors.append(f"{node.name} does not answer at rest")
        elif held:
            self.errors.append(f"{node.name} holds something for nobody: {stats}")
        elif left := [tenant for tenant in self._erased if tenant in stats.committed_by_tenant]:
            self.errors.append(f"{node.name} still has blocks of erased tenants: {left}")

    def _gather_errors(self) -> None:
        for part in self.parts:
            self.errors += part.faults()
        for worker in self.all_workers:
            self.errors += worker.errors
            worker.errors = []

    # -- figures -------------------------------------------------------------------------------------------------

    async def _tell_for_ever(self) -> None:
        started, told = time.monotonic(), 0
        while True:
            await asyncio.sleep(TELL_S)
            for node in self.nodes:
                await node.stats()
            self._gather_errors()
            for error in self.errors[told:MOST_TOLD]:
                print(error, file=sys.stderr)
            told, done, faults = len(self.errors), self.done(), sum(self.faults.values())
            rss = max((part.sizes[-1].rss for part in self.parts if part.sizes), default=0) // 2**20
            numbers = " ".join(f"{done[what]:7.0f} {what}" for what in ("published", "pulled", "brought", "evicted"))
            rest = f"{faults:3d} faults {self.rests:3d} rests, {rss:4d} MiB at most, {told} errors"
            print(f"{time.monotonic() - started:4.0f} s {numbers}, {rest}", file=sys.stderr, flush=True)

    def done(self) -> Counter[str]:
        """By all workers; of the nodes' numbers, what workers do not know."""
        done: Counter[str] = Counter()
        for worker in self.all_workers:
            done.update(worker.counts)
        for node in self.nodes:
            total = node.total()
            done.update({name: total[name] for name in OF_NODES})
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of all that is random"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    print(f"seed {args.seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(args.seed, Path(folder))
        asyncio.run(soak.run(args.minutes))
    done = Done(soak.done(), soak.loaded_s, soak.rests, soak.faults, len(soak.errors))
    figures = figures_of(done, soak.nodes, soak.all_workers)
    show(figures, soak.parts, soak.faults)
    if args.json:
        run = {"seed": args.seed, "minutes": args.minutes, "counts": soak.done(), "faults": soak.faults}
        args.json.write_text(json.dumps({**figures, "run": run}, indent=2) + "\n")
    if problems := soak.errors[:MOST_TOLD] + grown([*soak.nodes, *soak.all_workers]):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
