"""What the parts of bench/store.py stand on: a real store node, fresh chains of names, what a piece of work cost."""

import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
from door_client import cpu_clock
from door_servers import KVFERRY, running, until

from kvferry.common.block import slot_stride
from kvferry.common.hashing import NAME_BYTES, BlockName, Span
from kvferry.kvstore.client import StoreClient

SEGMENTS = 8  # of a block: the most there are, which costs the most
TENANT = "bench"
PULSE_S = 0.001


class Meaning(NamedTuple):
    """A figure's target, or nothing, and what it is."""

    target: str
    what: str


class Cost(NamedTuple):
    """Of one piece of work. `cpu_s`: of this process and of the store nodes that took part."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class StoreNode:
    """A store node that runs as a process."""

    process: psutil.Popen
    socket: Path
    block_bytes: int

    def client(self) -> StoreClient:
        return StoreClient(self.socket, self.block_bytes, SEGMENTS, "bench")

    def own_bytes(self) -> int:
        """Memory that is the process's own: not the arena, which is shared."""
        memory = self.process.memory_info()
        return memory.rss - memory.shared


@contextmanager
def store_node(block_bytes: int, slots: int, *flags: str) -> Iterator[StoreNode]:
    """A node with room for so many blocks. Ends with the context."""
    with tempfile.TemporaryDirectory(prefix="store-") as folder:
        socket, size = Path(folder) / "store", -(-slots * slot_stride(block_bytes) // 2**20)
        command = (KVFERRY, "store", f"--socket={socket}", f"--size={size}MiB", "--log-level=WARNING", *flags)
        with running(*command) as process:
            until(lambda: socket.exists() or process.poll() is not None, "a store node ready")
            if process.poll() is not None:
                raise SystemExit("the store node ended before it was ready")
            yield StoreNode(process, socket, block_bytes)


class Seen:
    """What was measured so far, by name, a cost a round. `processes` take part in the work."""

    def __init__(self, *processes: psutil.Popen):
        self.costs: dict[str, list[Cost]] = {}
        self._clocks = [time.CLOCK_PROCESS_CPUTIME_ID, *[cpu_clock(process.pid) for process in processes]]

    async def during(self, name: str, work: Awaitable[int], expected: int) -> None:
        """Wait for a piece of work, which must give `expected`, and note what it cost."""
        cpu, wall = self._cpu_s(), time.perf_counter()
        result = await work
        cost = Cost(time.perf_counter() - wall, self._cpu_s() - cpu)
        if result != expected:
            raise SystemExit(f"{name} gave {result} instead of {expected}")
        self.costs.setdefault(name, []).append(cost)

    def speed_over(self, name: str, limit: str) -> float:
        """How fast `name` was, over `limit`: the median of the rounds' own ratios, since both sides of a round saw the
        same machine."""
        return median(most.wall_s / own.wall_s for own, most in zip(self.costs[name], self.costs[limit], strict=True))

    def gb_per_s(self, name: str, size: int) -> float:
        return median(size / 1e9 / cost.wall_s for cost in self.costs[name])

    def cpu_s_per_gb(self, name: str, size: int) -> float:
        return median(cost.cpu_s / (size / 1e9) for cost in self.costs[name])

    def _cpu_s(self) -> float:
        return sum(time.clock_gettime(clock) for clock in self._clocks)


def chain(length: int) -> Span:
    """A chain that nobody has named before."""
    fresh = os.urandom(NAME_BYTES * (length + 1))
    root, *names = [BlockName(fresh[start : start + NAME_BYTES]) for start in range(0, len(fresh), NAME_BYTES)]
    return Span.of(names, root)


async def loop_late_ms(work: Awaitable[int]) -> float:
    """By how much the event loop came late, at worst, to an alarm that rang every millisecond of this work."""
    worst, under_way = 0.0, asyncio.ensure_future(work)
    while not under_way.done():
        due = time.perf_counter() + PULSE_S
        await asyncio.sleep(PULSE_S)
        worst = max(worst, time.perf_counter() - due)
    await under_way
    return worst * 1e3
