"""The processes of bench/door.py: a store node, stub workers, and the two servers before them that are measured."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
from door_client import Server

KVFERRY = Path(sys.executable).parent / "kvferry"
HERE = Path(__file__).parent
START_S, LOOK_S, STOP_S = 60.0, 0.05, 10.0


class Servers:
    """`router` and `relay` answer HTTP, `decode` is the stub's address. They end with the stack."""

    def __init__(self, model: str, tokenizer: str, most_streams: int, folder: Path, stack: ExitStack):
        store, prefill, self.decode = folder / "store", f"unix:{folder}/prefill", f"unix:{folder}/decode"
        stack.enter_context(running(KVFERRY, "store", f"--socket={store}", "--size=64MiB", "--log-level=WARNING"))
        stack.enter_context(running(sys.executable, HERE / "door_stub.py", prefill, self.decode, model, tokenizer))
        port, admin, bare = free_ports(3)
        router = running(
            KVFERRY, "router", f"--model={model}", f"--prefill={prefill}", f"--decode={self.decode}",
            f"--store={store}", f"--port={port}", f"--admin-port={admin}", f"--max-concurrent={2 * most_streams}",
            "--log-level=ERROR",
        )  # fmt: skip
        relay = running(sys.executable, HERE / "door_relay.py", str(bare), prefill, self.decode)
        self.router = Server(stack.enter_context(router), port)
        self.relay = Server(stack.enter_context(relay), bare)
        for server in (self.router, self.relay):
            until_ready(server)
        self._metrics = f"http://127.0.0.1:{admin}/metrics"

    async def until_idle(self) -> None:
        """Wait until the router has let go of every request. In a thread: the clients are still leaving."""
        await asyncio.to_thread(
            until, lambda: "kvferry_open_requests 0.0" in httpx.get(self._metrics).text, "the router idle"
        )


@contextmanager
def running(*command: str | Path) -> Iterator[psutil.Popen]:
    process = psutil.Popen([str(word) for word in command], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.stdin.close()
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_S)


def until_ready(server: Server) -> None:
    """The server answers, and knows all of its workers."""

    def ready() -> bool:
        if server.process.poll() is not None:
            raise SystemExit("a server ended before it was ready")
        try:
            answer = httpx.get(f"http://127.0.0.1:{server.port}/ready")
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and "missing" not in answer.text

    until(ready, "a server ready")


def until(found: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not found():
        if time.monotonic() > deadline:
            raise SystemExit(f"after {START_S:g} s: not {what}")
        time.sleep(LOOK_S)


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
