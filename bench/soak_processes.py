"""The processes of bench/soak.py: store nodes, a Redis, workers. Each may be killed and started again."""

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import store_redis
from door_servers import KVFERRY
from soak_ground import BLOCK_BYTES, SLOTS, Job
from soak_worker import Told

from kvferry.common.process import die_with_parent
from kvferry.common.store_api import StoreStats
from kvferry.kvstore.client import StoreClient

START_S, STOP_S, ANSWER_S = 90.0, 30.0, 90.0
LINE_BYTES = 2**20  # of a worker's standard output, at most
ENDED = "ended"  # in place of an answer
FAULTS = ("error", "critical")  # a log line of such a level is an error
HERE = Path(__file__).parent


class Size(NamedTuple):
    """Of a process, at one moment. `rss` of a node is without its arena, of which more and more comes to be in it."""

    rss: int
    fds: int


class Part:
    """A process under one name, which may have several lives."""

    owns_arena = False

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.starts = 0
        self.sizes: list[Size] = []
        self.log = folder / f"{name}.log"
        self._read = 0  # of the log
        self._process: Process | None = None

    @property
    def dead(self) -> bool:
        return self._process is None or self._process.returncode is not None

    @property
    def growth(self) -> Size:
        """From the first measurement to the last, of lives that may differ. Nothing if there was none."""
        if not self.sizes:
            return Size(0, 0)
        return Size(self.sizes[-1].rss - self.sizes[0].rss, self.sizes[-1].fds - self.sizes[0].fds)

    async def run(self, *command: str | Path, stdin: int = DEVNULL, stdout: int = DEVNULL) -> Process:
        self.starts += 1
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *[str(word) for word in command], stdin=stdin, stdout=stdout, stderr=log, limit=LINE_BYTES,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )  # fmt: skip
        return self._process

    async def kill(self) -> None:
        if not self.dead:
            self._process.kill()
            await self._process.wait()
        self._process = None

    def measure(self) -> None:
        if self.dead:
            return
        process = psutil.Process(self._process.pid)
        memory = process.memory_info()
        self.sizes.append(Size(memory.rss - (memory.shared if self.owns_arena else 0), process.num_fds()))

    def faults(self) -> list[str]:
        """What went wrong since the last call, as it tells itself; and whether it has ended by itself."""
        found = []
        if self._process is not None and self._process.returncode is not None:
            found.append(f"{self.name} ended by itself with {self._process.returncode}")
            self._process = None
        with self.log.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = whole.decode(errors="replace").splitlines()
        return found + [f"{self.name}: {line}" for line in lines if self.is_fault(line)]

    def is_fault(self, line: str) -> bool:
        """Whether a log line tells of an error; any line that is not one of JSON does."""
        try:
            record = json.loads(line)
            return record["level"] in FAULTS or "exception" in record
        except (ValueError, TypeError, KeyError):
            return True


class Node(Part):
    """A store node. Its numbers are added up over its lives, as far as they were asked for."""

    owns_arena = True

    def __init__(self, number: int, folder: Path, port: int, redis_port: int, secret: Path):
        super().__init__(f"node-{number}", folder)
        self.address = f"127.0.0.1:{port}"
        self.socket = folder / f"store-{number}"
        self._redis, self._secret = f"redis://127.0.0.1:{redis_port}", secret
        self._observer = StoreClient(self.socket, 0, 0, "soak")
        self._past: Counter[str] = Counter()
        self._last = StoreStats()

    async def start(self) -> None:
        """Returns before it is ready."""
        await self.run(
            KVFERRY, "store", f"--socket={self.socket}", f"--size={SLOTS * BLOCK_BYTES // 2**20}MiB",
            f"--listen={self.address}", f"--peer-secret-file={self._secret}", f"--redis={self._redis}",
            "--log-format=json",
        )  # fmt: skip

    async def until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while await self.stats() is None:
            if time.monotonic() > deadline or self.dead:
                raise SystemExit(f"{self.name} is not ready:\n{self.log.read_text()[-2000:]}")
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """End it as an operator would; another exit code than 0 is an error."""
        if self.dead:
            return
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_S):
            code = await self._process.wait()
        if not code:  # else faults() tells of it
            self._process = None

    async def watch(self) -> None:
        """From now on it can be asked for its numbers."""
        await self._observer.start()

    async def stats(self) -> StoreStats | None:
        stats = await self._observer.stats()
        if stats is not None:
            if stats.boot_id != self._last.boot_id:
                self._past.update(counted(self._last))
            self._last = stats
        return stats

    def total(self) -> Counter[str]:
        return self._past + Counter(counted(self._last))

    async def close(self) -> None:
        await self._observer.close()


def counted(stats: StoreStats) -> dict[str, int]:
    names = ("published", "brought", "sent", "evicted", "erased", "publish_dropped", "late_commits", "bad_blocks")
    return {name: getattr(stats, name) for name in names}


class Worker(Part):
    """A process that does the work. `counts` are those of all its lives."""

    def __init__(self, name: str, folder: Path, job: Job):
        super().__init__(name, folder)
        self.errors: list[str] = []
        self.slowest_s = 0.0
        self._job = job
        self._past: Counter[str] = Counter()
        self._now: dict[str, float] = {}
        self._answers: asyncio.Queue[str] = asyncio.Queue()
        self._reading: asyncio.Task[None] | None = None

    @property
    def counts(self) -> Counter[str]:
        return self._past + Counter(self._now)

    async def start(self, generations: list[int]) -> None:
        job = msgspec.structs.replace(self._job, seed=f"{self._job.seed}/{self.starts}", generations=tuple(generations))
        process = await self.run(
            sys.executable, HERE / "soak_worker.py", msgspec.json.encode(job).decode(), stdin=PIPE, stdout=PIPE
        )
        self._answers = asyncio.Queue()
        self._reading = asyncio.create_task(self._read_for_ever(process, self._answers))

    async def kill(self) -> None:
        await super().kill()
        await self._end_life()

    async def end(self) -> None:
        """In good order: its work under way is cancelled."""
        if not self.dead:
            self._process.stdin.close()
            async with asyncio.timeout(STOP_S):
                if not await self._process.wait():  # else faults() tells of it
                    self._process = None
        await self._end_life()

    async def tell(self, command: str) -> None:
        """Returns once it is done, or the process has ended."""
        if self.dead:
            return
        self._process.stdin.write(f"{command}\n".encode())
        try:
            async with asyncio.timeout(ANSWER_S):
                while await self._answers.get() not in (command.split()[0], ENDED):
                    continue
        except TimeoutError:
            self.errors.append(f"{self.name} did not {command} within {ANSWER_S:g} s")

    async def _end_life(self) -> None:
        await self._reading
        self._past, self._now = self.counts, {}

    async def _read_for_ever(self, process: Process, answers: "asyncio.Queue[str]") -> None:
        while (line := await process.stdout.readline()).endswith(b"\n"):  # else it was killed in the middle of it
            told = msgspec.json.decode(line, type=Told)
            self.slowest_s = max(self.slowest_s, told.counts.pop("slowest_s", 0.0))
            self._now = told.counts
            self.errors += [f"{self.name}: {error}" for error in told.errors]
            if told.answer:
                answers.put_nowait(told.answer)
        answers.put_nowait(ENDED)


class Redis(Part):
    def __init__(self, folder: Path, port: int):
        super().__init__("redis", folder)
        self._port = port

    async def start(self) -> None:
        await self.run(*store_redis.command(self._port))

    async def until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not await asyncio.to_thread(store_redis.answers, self._port):
            if time.monotonic() > deadline or self.dead:
                raise SystemExit("Redis is not ready")
            await asyncio.sleep(0.1)

    async def flush(self) -> None:
        await asyncio.to_thread(store_redis.flush, self._port)

    def is_fault(self, line: str) -> bool:
        return False  # its warnings are of no interest here
