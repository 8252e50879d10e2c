"""Clients of one HTTP server for bench/door.py: they count events and look at the clock, and parse nothing."""

import asyncio
import ctypes
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

ANSWER_S = 60.0
QUIET = 0.25  # of a gap between steps, without an event: then the step is over
FOREVER_US = 3600 * 10**6
AFTER_LAST = 2  # events of an answer that are no token: the finish reason, and the end mark


def cpu_clock(pid: int) -> int:
    """The clock of all CPU time that a process has used, for `time.clock_gettime`; in nanoseconds, where psutil counts
    in hundredths of a second."""
    libc, clock = ctypes.CDLL(None), ctypes.c_int()
    if (error := libc.clock_getcpuclockid(pid, ctypes.byref(clock))) != 0:
        raise OSError(error, os.strerror(error))
    return clock.value


@dataclass
class Server:
    """A process that answers HTTP."""

    process: psutil.Popen
    port: int
    clock: int = field(init=False)

    def __post_init__(self) -> None:
        self.clock = cpu_clock(self.process.pid)

    def cpu_s(self) -> float:
        return time.clock_gettime(self.clock)

    def memory_mib(self) -> float:
        return self.process.memory_info().rss / 2**20


class Connection(asyncio.Protocol):
    """A connection on which one request is under way at a time. `events`: how many have come of it. `changed` is set
    with each."""

    def __init__(self, changed: asyncio.Event):
        self._changed = changed
        self._transport: asyncio.Transport | None = None
        self._answer = bytearray()
        self.first: asyncio.Future[float] | None = None
        self.ended: asyncio.Future[float] | None = None
        self.events = 0

    @classmethod
    async def open(cls, port: int, changed: asyncio.Event) -> "Connection":
        _, connection = await asyncio.get_running_loop().create_connection(lambda: cls(changed), "127.0.0.1", port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self, request: bytes) -> None:
        """The futures become the moments of its first event and of its end."""
        loop = asyncio.get_running_loop()
        self.first, self.ended = loop.create_future(), loop.create_future()
        self.events, self._answer = 0, bytearray()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._answer and not data.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the server answered {data[:600].decode()}")
        self.events += (self._answer[-1:] + data).count(b"\n\n")
        self._answer = (self._answer + data)[-32:]
        self._changed.set()
        if self.events and not self.first.done():
            self.first.set_result(now)
        if self._answer.endswith(b"0\r\n\r\n"):
            self.ended.set_result(now)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended is not None and not self.ended.done():
            self.ended.set_exception(exc or ConnectionResetError("the server closed a connection"))

    def close(self) -> None:
        if self.ended is not None:
            self.ended.cancel()
        self._transport.abort()


@dataclass(frozen=True)
class Cost:
    """What the server took for what was asked of it."""

    cpu_s: float
    wall_s: float
    ttft_s: list[float]


class Clients:
    """All clients of a server."""

    def __init__(self, server: Server, model: str):
        self.server, self._model = server, model
        self._changed = asyncio.Event()
        self._held: list[Connection] = []

    def request(self, prompt: str | Sequence[int], tokens: int, gap_us: int) -> bytes:
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": tokens, "seed": gap_us, "stream": True,
            "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: door\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data

    async def ask(self, prompts: Sequence[str | Sequence[int]], tokens: int, at_once: int = 1) -> Cost:
        """All prompts, `at_once` at a time, each client on a connection of its own; tokens come without a gap."""
        waiting = [self.request(prompt, tokens, 0) for prompt in reversed(prompts)]
        connections = [await Connection.open(self.server.port, self._changed) for _ in range(at_once)]
        ttft: list[float] = []

        async def client(connection: Connection) -> None:
            while waiting:
                started = time.perf_counter()
                connection.send(waiting.pop())
                await connection.ended
                ttft.append(connection.first.result() - started)
                if connection.events != tokens + AFTER_LAST:
                    raise SystemExit(f"{connection.events - AFTER_LAST} tokens came instead of {tokens}")

        started, cpu = time.perf_counter(), self.server.cpu_s()
        async with asyncio.timeout(ANSWER_S):
            await asyncio.gather(*map(client, connections))
        cost = Cost(self.server.cpu_s() - cpu, time.perf_counter() - started, ttft)
        for connection in connections:
            connection.close()
        return cost

    async def hold(self, prompts: Sequence[str], tokens: int, gap_us: int = FOREVER_US) -> None:
        """More open streams, each at its first token or further."""
        async with asyncio.timeout(ANSWER_S):
            for prompt in prompts:
                self._held.append(connection := await Connection.open(self.server.port, self._changed))
                connection.send(self.request(prompt, tokens, gap_us))
            await asyncio.gather(*[connection.first for connection in self._held])

    async def cpu_per_token(self, steps: int, gap_us: int) -> float:
        """Seconds the server takes for a token of the streams that are held, over so many steps, from pause to
        pause."""
        await self._pause(gap_us / 1e6)
        cpu, before = self.server.cpu_s(), self._events()
        async with asyncio.timeout(ANSWER_S):
            while self._events() - before < steps * len(self._held):
                self._changed.clear()
                await self._changed.wait()
        await self._pause(gap_us / 1e6)
        return (self.server.cpu_s() - cpu) / (self._events() - before)

    async def _pause(self, gap_s: float) -> None:
        """Wait until the step is over."""
        async with asyncio.timeout(ANSWER_S):
            while True:
                self._changed.clear()
                try:
                    async with asyncio.timeout(gap_s * QUIET):
                        await self._changed.wait()
                except TimeoutError:
                    return

    def _events(self) -> int:
        return sum(connection.events for connection in self._held)

    def drop(self) -> None:
        """The clients of the open streams go away."""
        for connection in self._held:
            connection.close()
        self._held.clear()
