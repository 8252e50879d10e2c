"""Real store nodes and workers, each a process of its own, for the tests of this folder."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np
import pytest
from redis_server import RedisServer
from spans import span

from kvferry.common.process import Note
from kvferry.common.store_api import Payload
from kvferry.kvstore.client import StoreClient

HERE = Path(__file__).parent
BLOCK_BYTES = 64 * 1024
SEGMENTS = 2
ROOT = b"root".ljust(32)


class Node:
    """One store process. `socket` and `address` stay the same over `start` and `kill`. `prefix`: what its command is
    run by."""

    def __init__(self, socket: Path, prefix: Sequence[str] = (), **config: object):
        self.socket = socket
        self.listen = config.get("listen") or ""
        self.address = config.get("advertise") or self.listen
        self._config = json.dumps({"socket": str(socket), **config})
        self._prefix = prefix
        self.process: subprocess.Popen | None = None

    def start(self) -> list[Note]:
        """Until ready; what it said on the way. Raises RuntimeError if it ends instead."""
        self.begin()
        return self.wait_ready()

    def begin(self) -> None:
        self._notes, write = os.pipe()
        command = [*self._prefix, sys.executable, str(HERE / "node_process.py"), str(write), self._config]
        self.process = subprocess.Popen(command, pass_fds=[write])
        os.close(write)

    def wait_ready(self) -> list[Note]:
        with os.fdopen(self._notes, "rb") as pipe:
            notes = []
            for line in pipe:
                notes.append(msgspec.json.decode(line, type=Note))
                if notes[-1].ready:
                    return notes
        raise RuntimeError(f"the node ended with {self.process.wait()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(10)

    def stop(self) -> None:
        """Whatever it does; nobody is told. `resume` follows."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def open_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> int:
        """Bytes of its own: not those of the arena."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Worker:
    """A publisher process (worker_process.py)."""

    def __init__(self, node: Node, label: str, count: int, *failpoints: str):
        command = [sys.executable, str(HERE / "worker_process.py"), str(node.socket), label, str(count), *failpoints]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def wait_stopped(self) -> None:
        """Until a failpoint has stopped it."""
        pid, status = os.waitpid(self.process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"worker {pid} ended with {status} instead of stopping")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Ground:
    """What the tests of this folder share: names, payloads, processes, waiting."""

    block_bytes = BLOCK_BYTES
    root = ROOT

    def __init__(self, folder: Path):
        self.folder = folder
        self._running: list[Node | Worker | RedisServer] = []

    def node(
        self,
        slots: int = 64,
        lease_s: float = 10.0,
        writing: int = 1024,
        start: bool = True,
        prefix: Sequence[str] = (),
        **config: object,
    ) -> Node:
        path = self.folder / f"s{len(self._running)}.sock"
        config |= {"size_bytes": max(slots * BLOCK_BYTES, 2**20), "lease_s": lease_s, "writing_per_connection": writing}
        node = Node(path, prefix, **config)
        self._running.append(node)
        if start:
            node.start()
        return node

    def peer(self, host: str = "127.0.0.1", secret: str = "the secret of all stores", **config: object) -> Node:
        """A node that other nodes reach, at a port that was free."""
        file = self.folder / f"secret-{hashlib.sha256(secret.encode()).hexdigest()[:8]}"
        file.touch(0o600)
        file.write_text(secret)
        with socket.create_server((host if "prefix" not in config else "127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        return self.node(listen=f"{host}:{port}", peer_secret_file=str(file), **config)

    def peers(self, count: int, **config: object) -> list[Node]:
        """So many, started side by side."""
        nodes = [self.peer(start=False, **config) for _ in range(count)]
        self.start(*nodes)
        return nodes

    @staticmethod
    def start(*nodes: Node) -> None:
        for node in nodes:
            node.begin()
        for node in nodes:
            node.wait_ready()

    def redis(self, *options: str) -> RedisServer:
        """A Redis for the nodes' directories."""
        server = RedisServer(*options)
        self._running.append(server)
        return server.start()

    def worker(self, node: Node, label: str, count: int, *failpoints: str) -> Worker:
        worker = Worker(node, label, count, *failpoints)
        self._running.append(worker)
        return worker

    def client(self, node: Node, **changes) -> StoreClient:
        given = {"block_bytes": BLOCK_BYTES, "segments": SEGMENTS, "role": "test", **changes}
        return StoreClient(node.socket, **given)

    def end(self) -> None:
        for each in reversed(self._running):
            if not isinstance(each, Node):
                each.end()
            elif each.process is not None and each.process.poll() is None:
                each.resume()
                each.kill()

    @staticmethod
    def names(label: str, count: int) -> list[bytes]:
        return names_of(label, count)

    @staticmethod
    def payloads(names: list[bytes]) -> list[Payload]:
        return payloads_of(names)

    @staticmethod
    def room(count: int) -> list[memoryview]:
        return [memoryview(np.zeros(BLOCK_BYTES, dtype=np.uint8)) for _ in range(count)]

    @staticmethod
    async def until(condition, seconds: float = 10.0):
        """The first true value of `condition()`, which may be a coroutine function. Fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            assert time.monotonic() < deadline, f"still not so after {seconds} s"
            await asyncio.sleep(0.01)

    async def publish(self, client: StoreClient, names: list[bytes], tenant: str = "t", keep: bool = False) -> int:
        """Reserve, publish and (unless `keep`) release; how many are there."""
        reservation = await client.reserve(span(names), tenant=tenant)
        there = await client.publish(reservation, payloads_of(names))
        if not keep:
            await client.release(reservation.lease)
        return there


def names_of(label: str, count: int) -> list[bytes]:
    return [blake2b(f"{label}-{i}".encode(), digest_size=32).digest() for i in range(count)]


def payloads_of(names: list[bytes]) -> list[Payload]:
    """Payloads whose bytes follow from their names."""
    return [
        Payload(name, parent, memoryview(np.random.default_rng(list(name)).integers(0, 256, BLOCK_BYTES, np.uint8)))
        for parent, name in zip([ROOT, *names], names, strict=False)
    ]


@pytest.fixture
def ground():
    folder = Path(tempfile.mkdtemp(prefix="kvf-"))  # a unix path is short; tmp_path may not be
    ground = Ground(folder)
    yield ground
    ground.end()
    shutil.rmtree(folder)
