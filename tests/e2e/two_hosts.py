"""A kvferry over several hosts, started with the commands of the README: Redis, a store and prefill on host a, a store
and decode on host b, and the router on b, or on c with a store of its own."""

import asyncio
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import redis
from e2e.capture import Relays
from e2e.cluster import ANSWER_S, KVFERRY, LOCAL, POOL_BLOCKS, START_S, STOP_S, Cluster, until
from e2e.netns import Host, Loopback
from e2e.probe import Probe, arena_of
from redis_server import redis_binary

from kvferry.common.block import slot_stride
from kvferry.common.credentials import files_of
from kvferry.common.hashing import BlockName, Span, TenantId
from kvferry.common.store_api import StoreStats
from kvferry.kvstore.client import StoreClient
from kvferry.router.tenants import Tenants

ENGINE = ("--dtype=float32", "--threads=1", "--max-num-batched-tokens=64", f"--num-gpu-blocks-override={POOL_BLOCKS}")
PATIENCE_S = 2 * START_S  # there are six processes
CONNECTED = "connected to the store at"
REDIS, STORE, PREFILL, DECODE, API, ADMIN = 6379, 7700, 7710, 7720, 8000, 8001  # ports


class TwoHosts(Cluster):
    """The folder of a host has what was copied there, and its socket. `relayed`: where there is no network to look at,
    relays show what passes between hosts."""

    def __init__(self, net: Loopback, model: Path, folder: Path, tenants_file: Path, *, relayed: bool = True):
        super().__init__(model, folder / "router.log")
        self.net, self._root, self.tenants_file = net, folder, tenants_file
        self.a, self.b = net.hosts["a"], net.hosts["b"]
        self.front = net.hosts.get("c", self.b)
        self.url = f"http://{self.front.address}:{API}"
        self.http = httpx.Client(base_url=self.url, timeout=ANSWER_S, limits=httpx.Limits(max_keepalive_connections=0))
        self.processes: dict[str, subprocess.Popen] = {}
        self.relays = Relays() if relayed and not net.can_cut else None
        names = [name for name in self.where if name not in ("redis", "router")] if self.relays else []
        self.advertised: dict[str, str] = {}  # by which address a process is reached, where it is not its own
        self.advertised = {name: self.relays.to(self.at(name)) for name in names}

    # -- what a person types -------------------------------------------------------------------------------------

    def folder_of(self, host: Host) -> Path:
        return self._root / host.name

    def certs_of(self, host: Host) -> Path:
        return self.folder_of(host) / "certs"

    @property
    def where(self) -> dict[str, Host]:
        """The host of each process, in the order in which they are started."""
        stores = {f"store {host.name}": host for host in self.net.hosts.values()}
        return {"redis": self.a, **stores, "prefill": self.a, "decode": self.b, "router": self.front}

    def at(self, name: str) -> str:
        """The address by which other hosts reach a process."""
        port = {"redis": REDIS, "prefill": PREFILL, "decode": DECODE, "router": API}.get(name, STORE)
        return self.advertised.get(name, f"{self.where[name].address}:{port}")

    def command(self, name: str) -> list[str]:
        host = self.where[name]
        folder, certs, here = self.folder_of(host), self.certs_of(host), host.address
        match name.split()[0]:
            case "redis":
                return [redis_binary(), "--bind", here, "--port", str(REDIS), "--protected-mode", "no", "--save", "",
                        "--dir", str(folder)]  # fmt: skip
            case "store":
                told = [f"--advertise={self.advertised[name]}"] if name in self.advertised else []
                return [*KVFERRY, "store", f"--socket={folder}/store", "--size=64MiB", f"--listen={here}:{STORE}",
                        f"--peer-secret-file={certs}/store.secret", *self.redis_flags(host), *told]  # fmt: skip
            case "prefill" | "decode" as role:
                port = PREFILL if role == "prefill" else DECODE
                return [*KVFERRY, role, str(self.model), f"--listen={here}:{port}", f"--store={folder}/store",
                        f"--certs={certs}", *ENGINE]  # fmt: skip
            case _:
                return [*KVFERRY, "router", f"--model={self.model}", f"--prefill={self.at('prefill')}",
                        f"--decode={self.at('decode')}", f"--store={folder}/store", f"--certs={certs}",
                        f"--tenants-file={self.tenants_file}", f"--host={here}", f"--port={API}",
                        f"--admin-host={here}", f"--admin-port={ADMIN}",
                        f"--max-local-prefill-length={LOCAL}"]  # fmt: skip

    def redis_flags(self, host: Host) -> list[str]:
        return [f"--redis=redis://{self.a.address}:{REDIS}", "--redis-user=kvferry",
                f"--redis-password-file={self.certs_of(host)}/redis.password"]  # fmt: skip

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> "TwoHosts":
        self._hand_out()
        try:
            self.run("redis")
            until(self._redis_answers, START_S, "Redis there")
            self.admit_to_redis()
            for name in list(self.where)[1:]:
                self.run(name)
            self.process = self.processes["router"]
            until(self._started, PATIENCE_S, "every worker there")
        except BaseException:
            self.kill()
            raise
        return self

    def _hand_out(self) -> None:
        """Certificates and secrets, to each host those of its roles and no others."""
        made = self._root / "made"
        subprocess.run([*KVFERRY, "certs", "init", str(made)], check=True, capture_output=True)
        (made / "redis.password").write_text("a password of Redis\n")
        for name, host in self.where.items():
            self.certs_of(host).mkdir(parents=True, exist_ok=True)
            role = name.split()[0]
            files = ("store.secret", "redis.password") if role == "store" else () if role == "redis" else files_of(role)
            for file in files:
                shutil.copy2(made / file, self.certs_of(host))

    def admit_to_redis(self) -> None:
        line = subprocess.check_output(
            [*KVFERRY, "store", "--print-redis-acl", *self.redis_flags(self.a)[1:]], text=True
        )  # fmt: skip
        with self.redis() as client:
            client.execute_command(*line.split())

    def _redis_answers(self) -> bool:
        with self.redis() as client:
            try:
                return client.ping()
            except redis.ConnectionError:
                return False

    def redis(self) -> redis.Redis:
        return redis.Redis(self.a.address, REDIS, socket_timeout=5)

    def run(self, name: str) -> subprocess.Popen:
        with open(self._root / f"{name}.log", "ab") as log:
            self.processes[name] = self.where[name].popen(self.command(name), log, self._env)
        return self.processes[name]

    def _started(self) -> bool:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}: {self.log_of(name)[-2000:]}")
        return self.ready() and all(node["ready"] for node in self.nodes()["nodes"])

    def end(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0, self.log_of(name)[-2000:]

    def kill_one(self, name: str) -> None:
        self.processes[name].kill()
        self.processes.pop(name).wait()

    def run_store_again(self, host: str) -> None:
        """Start a store that was killed, and wait until each process of its host has found it."""
        beside = [
            name for name, at in self.where.items() if at.name == host and name in ("prefill", "decode", "router")
        ]
        before = {name: self.log_of(name).count(CONNECTED) for name in beside}
        self.run(f"store {host}")
        until(lambda: all(self.log_of(name).count(CONNECTED) > before[name] for name in beside), 20, "store back")

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """A process does nothing meanwhile."""
        self.processes[name].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.processes[name].send_signal(signal.SIGCONT)

    @contextmanager
    def killed_redis(self) -> Iterator[None]:
        self.kill_one("redis")
        try:
            yield
        finally:
            self.run("redis")
            until(self._redis_answers, START_S, "Redis back")
            self.admit_to_redis()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Asserts that each process ends well, and in time."""
        self.http.close()
        try:
            for name in reversed(list(self.where)):
                if name in self.processes:
                    self.end(name)
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        if self.relays is not None:
            self.relays.close()
            self.relays = None

    # -- what there is -------------------------------------------------------------------------------------------

    def log_of(self, name: str) -> str:
        return (self._root / f"{name}.log").read_text(errors="replace")

    def tail(self, size: int = 6000) -> str:
        return "\n".join(f"-- {name}\n{self.log_of(name)[-size:]}" for name in self.processes)

    def admin(self, path: str) -> httpx.Response:
        response = httpx.get(f"http://{self.front.address}:{ADMIN}{path}", timeout=10)
        response.raise_for_status()
        return response

    def stats(self, name: str) -> StoreStats | None:
        """What a host's store says of itself, to an observer; None if it is not there."""

        async def ask() -> StoreStats | None:
            store = StoreClient(self.folder_of(self.net.hosts[name]) / "store", 0, 0, "test")
            await store.start()
            try:
                return await store.stats()
            finally:
                await store.close()

        return asyncio.run(ask())

    def busy(self) -> dict[str, Any]:
        told = self.stats("a")
        held = told and {name: getattr(told, name) for name in ("leases", "writing", "reserved")}
        return super().busy() | ({"store of a": held} if held and any(held.values()) else {})

    def of(self, host: Host) -> "Side":
        return Side(self, host)

    def pseudonym(self, tenant: str) -> str:
        return Tenants.load(self.tenants_file)[TenantId(tenant)].keys.pseudonym


class Side:
    """What `Probe` wants to know of a cluster, as one of its hosts has it."""

    def __init__(self, cluster: TwoHosts, host: Host):
        self._cluster = cluster
        self.folder, self._store = cluster.folder_of(host), f"store {host.name}"

    def node(self, role: str) -> dict[str, Any]:
        return self._cluster.node(role)

    def of_role(self, role: str) -> psutil.Process:
        assert role == "store"
        return psutil.Process(self._cluster.processes[self._store].pid)


class EveryStore(Probe):
    """A block is taken out of every store that has it, so that it is gone; it is there where the router looks."""

    def __init__(self, cluster: TwoHosts):
        super().__init__(cluster.of(cluster.b), cluster.tenants_file)
        others = [host for host in cluster.net.hosts.values() if host is not cluster.b]
        self._others = [Probe(cluster.of(host), cluster.tenants_file) for host in others]

    def remove(self, name: BlockName) -> None:
        super().remove(name)
        for other in self._others:
            if other.present([name]) == [True]:
                other.remove(name)

    def bytes_of(self, prompt: list[int], seal: bytes) -> tuple[list[bytes], list[bytes]]:
        """A prompt's blocks as they are computed, and as they lie in the arena of b."""
        names = self.names(prompt)

        async def pull(store: StoreClient) -> tuple[list[bytes], list[int]]:
            match = await store.lookup(Span.of(names, self.root()))
            into = [bytearray(self._layout.block_bytes) for _ in names]
            good = await store.pull(match, [memoryview(block) for block in into], seal)
            await store.release(match.lease)
            return list(map(bytes, into[:good])), [block.slot for block in match.blocks]

        plain, slots = self._with_store(pull)
        with open(arena_of(self._cluster.of_role("store").pid), "rb") as arena:
            return plain, [self._read(arena, slot) for slot in slots]

    def _read(self, arena: IO[bytes], slot: int) -> bytes:
        arena.seek(slot * slot_stride(self._layout.block_bytes))
        return arena.read(self._layout.block_bytes)
