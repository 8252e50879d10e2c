"""A whole kvferry whose parts were started one by one, as on hosts of their own: they speak TLS over TCP, and each has
its own folder of certificates."""

import shutil
import signal
import subprocess
from pathlib import Path

import psutil
from e2e.cluster import KVFERRY, LOCAL, POOL_BLOCKS, START_S, STOP_S, Cluster, free_port, until

from kvferry.common.credentials import files_of

TAKEN = "is another one now, valid until"
ENGINE = ("--dtype=float32", "--threads=1", "--max-num-batched-tokens=64", f"--num-gpu-blocks-override={POOL_BLOCKS}")


class Hosts(Cluster):
    """`certs` is the operator's folder; what a role's host has of it is in `folder_of(role)`, once it was copied."""

    def __init__(self, model: Path, folder: Path, tenants_file: Path):
        super().__init__(model, folder / "router.log")
        self._folder, self._tenants_file = folder, tenants_file
        self.certs = folder / "certs"
        self.addresses = {"prefill": f"127.0.0.1:{free_port()}", "decode": f"localhost:{free_port()}"}
        self.listens = {
            "prefill": self.addresses["prefill"],
            "decode": self.addresses["decode"].replace("localhost", "0.0.0.0"),
        }
        self.processes: dict[str, subprocess.Popen] = {}

    def folder_of(self, role: str) -> Path:
        return self._folder / f"certs of {role}"

    def log_of(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def manage(self, *arguments: str) -> None:
        """`kvferry certs`, at the operator's."""
        subprocess.run([*KVFERRY, "certs", *arguments], check=True, capture_output=True)

    def copy(self, role: str) -> None:
        """What the role's host needs. Not all at once: it is three files."""
        self.folder_of(role).mkdir(mode=0o700, exist_ok=True)
        for name in files_of(role):
            beside = self.folder_of(role) / f".{name}"
            shutil.copy2(self.certs / name, beside)
            beside.replace(self.folder_of(role) / name)

    def renew(self, role: str) -> None:
        """Copy a role's files, and wait until its process has taken them."""
        before = self.log_of(role).count(TAKEN)
        self.copy(role)
        until(lambda: self.log_of(role).count(TAKEN) > before, 20, f"new certificates at {role}")

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> "Hosts":
        self.manage("init", str(self.certs))
        for role in ("router", "prefill", "decode", "doctor"):
            self.copy(role)
        store = f"--store={self._folder / 'store'}"
        try:
            self.run("store", "store", f"--socket={self._folder / 'store'}", "--size=64MiB")
            until((self._folder / "store").exists, START_S, "store")
            for role in ("prefill", "decode"):
                self.run(role, role, str(self.model), f"--listen={self.listens[role]}", store, *ENGINE,
                         f"--certs={self.folder_of(role)}")  # fmt: skip
            self.process = self.run_router("router", self.port, self.admin_port, self.addresses)
            until(self._started, START_S, "ready")
        except BaseException:
            self.kill()
            raise
        return self

    def run(self, name: str, *arguments: str) -> subprocess.Popen:
        command = [*KVFERRY, *arguments, "--log-format=text"]
        with open(self._folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._env)
        self.processes[name] = process
        return process

    def run_router(self, name: str, port: int, admin_port: int, addresses: dict[str, str]) -> subprocess.Popen:
        return self.run(name, "router", f"--model={self.model}", f"--store={self._folder / 'store'}",
                        f"--port={port}", f"--admin-port={admin_port}", f"--max-local-prefill-length={LOCAL}",
                        f"--tenants-file={self._tenants_file}", f"--certs={self.folder_of('router')}",
                        *[f"--{role}={address}" for role, address in addresses.items()])  # fmt: skip

    def _started(self) -> bool:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}: {self.log_of(name)[-2000:]}")
        return self.ready() and all(node["ready"] for node in self.nodes()["nodes"])

    def end(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0, self.log_of(name)[-2000:]

    def stop(self) -> None:
        self.http.close()
        try:
            for name in ("router", "decode", "prefill", "store"):
                self.end(name)
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def tail(self, size: int = 6000) -> str:
        return "\n".join(f"-- {name}\n{self.log_of(name)[-size:]}" for name in self.processes)

    def connections(self, role: str) -> int:
        """How many the router has to a worker."""
        port = int(self.addresses[role].rpartition(":")[2])
        told = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(1 for one in told if one.raddr and one.raddr.port == port and one.status == "ESTABLISHED")
