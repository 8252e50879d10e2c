"""A Mooncake Store beside bench/store_remote.py: a master, a process that keeps blocks, and one that reads them."""

import asyncio
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
from door_servers import STOP_S, free_ports, until

PEER = Path(__file__).with_name("mooncake_peer.py")
LOOKED_FOR_S = 60.0
LEASE = "1h"  # of what was read
LOG_TAIL = 2000


class Mooncake:
    """`processes` take part in the work. `get` reads all blocks and gives how many came."""

    def __init__(self, reader: psutil.Popen, *others: psutil.Popen):
        self.processes = (reader, *others)
        self._reader = reader

    async def get(self) -> int:
        return await asyncio.to_thread(self._get)

    def _get(self) -> int:
        self._reader.stdin.write("get\n")
        self._reader.stdin.flush()
        return int(answer(self._reader) or -1)


class Installed(NamedTuple):
    """An interpreter that has mooncake, and the program of its master."""

    python: Path
    master: str


def find(python: Path | None) -> Installed | None:
    """None, and a word about it, where the interpreter (ours, if none is given) has no mooncake."""
    python = python or Path(sys.executable)
    found = subprocess.run([python, PEER, "master"], capture_output=True, text=True, timeout=LOOKED_FOR_S)
    if not found.returncode:
        return Installed(python, found.stdout.strip())
    why = (found.stderr.strip().splitlines() or ["it ends"])[-1]
    print(f"no mooncake to compare with: {python} says {why} (--mooncake-python PATH names another interpreter; "
          "mooncake-transfer-engine-non-cuda needs libibverbs1)", file=sys.stderr)  # fmt: skip
    return None


@contextmanager
def mooncake(installed: Installed | None, count: int, size: int) -> Iterator[Mooncake | None]:
    """With so many blocks in it; None where it is not installed."""
    if installed is None:
        yield None
        return
    port, metrics = free_ports(2)
    where = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        master = stack.enter_context(
            quiet(installed.master, "--rpc_address=127.0.0.1", f"--rpc_port={port}", "--metrics_host=127.0.0.1",
                  f"--metrics_port={metrics}", f"--default_kv_lease_ttl={LEASE}")
        )  # fmt: skip
        until(lambda: listens(port), "a Mooncake master ready")
        peers = []
        for mode in ("hold", "get"):
            peers.append(stack.enter_context(quiet(installed.python, PEER, mode, where, str(count), str(size))))
            if (said := answer(peers[-1])) != "ready":
                raise SystemExit(f"mooncake's {mode} process said {said!r}")
        holder, reader = peers
        yield Mooncake(reader, holder, master)


@contextmanager
def quiet(*command: str | Path) -> Iterator[psutil.Popen]:
    """A process to talk with by lines, whose log is shown only when it fails."""
    with tempfile.TemporaryFile("w+") as log:
        process = psutil.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield process
        finally:
            process.stdin.close()
            if process.poll():
                log.seek(0)
                print(log.read()[-LOG_TAIL:], file=sys.stderr)
            process.terminate()
            process.wait(STOP_S)
            process.stdout.close()


def answer(process: psutil.Popen) -> str:
    """The next line that is ours; a library may say something as well."""
    while line := process.stdout.readline():
        if (said := line.strip()).isdecimal() or said == "ready":
            return said
    return ""


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
