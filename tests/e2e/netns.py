"""Hosts of a test. Each is a network namespace with a cable to one bridge, which the test's own host is on too; cables
can be cut, slowed and healed. Where namespaces cannot be made, a host is an address of loopback, and has no cable.

    the bridge kvfN, 198.18.N.254    host a: namespace kvfN-a, eth0 198.18.N.1    host b: kvfN-b, 198.18.N.2  ...

N is this run's own, by a lock that ends with its process: what bears a number that nobody holds was left behind by a
run that was killed, and is removed before another one begins.
"""

import ctypes
import fcntl
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import permutations
from pathlib import Path
from typing import IO

NUMBERS = range(1, 255)
NOWHERE = "02:00:00:00:00:01"  # an Ethernet address that nobody has
OURS = re.compile(r"kvf(\d+)(-\w+)?")
STOP_S = 5.0


def ip(*words: object) -> str:
    return _output("ip", *words)


def tc(host: "Host", *words: object) -> str:
    return _output(*host.inside, "tc", *words)


def _output(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """`inside`: what a command begins with to run there."""

    def __init__(self, name: str, address: str, inside: Sequence[str] = ()):
        self.name, self.address, self.inside = name, address, tuple(inside)

    def popen(self, command: Sequence[str], output: IO[bytes], env: dict[str, str] | None = None) -> subprocess.Popen:
        """Start a process there; it ends with the test's. `ip netns exec` becomes the command, so the process is it."""
        libc = ctypes.CDLL(None)
        return subprocess.Popen(
            [*self.inside, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env,
            preexec_fn=lambda: libc.prctl(1, signal.SIGKILL, 0, 0, 0),  # PR_SET_PDEATHSIG
        )  # fmt: skip


class Loopback:
    """Hosts that are only addresses."""

    can_cut = False

    def __init__(self, number: int):
        self._number = number
        self.hosts: dict[str, Host] = {}

    def add(self, name: str) -> Host:
        self.hosts[name] = Host(name, self._address(len(self.hosts) + 1))
        return self.hosts[name]

    def _address(self, at: int) -> str:
        return f"127.77.{self._number}.{at}"

    def close(self) -> None:
        """There is nothing to take away."""


class Namespaces(Loopback):
    """Hosts of their own."""

    can_cut = True

    def __init__(self, number: int):
        super().__init__(number)
        self._bridge = f"kvf{number}"
        ip("link", "add", self._bridge, "type", "bridge")
        ip("address", "add", f"{self._address(254)}/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")

    def _address(self, at: int) -> str:
        return f"198.18.{self._number}.{at}"  # for tests of networks (RFC 2544): nobody is there

    def add(self, name: str) -> Host:
        host, space = super().add(name), f"{self._bridge}-{name}"
        host.inside = ("ip", "netns", "exec", space)
        ip("netns", "add", space)
        cable = f"{self._bridge}p{len(self.hosts)}"
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", cable, "master", self._bridge, "up")
        ip("-n", space, "address", "add", f"{host.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            ip("-n", space, "link", "set", link, "up")
        return host

    def cut(self, one: Host, other: Host) -> None:
        """From now on nothing of either reaches the other; nobody is told so."""
        for here, there in permutations((one, other)):
            self._neighbour(here, "replace", there, "lladdr", NOWHERE, "nud", "permanent")

    def slow(self, host: Host, mbit: float) -> None:
        """What the host sends takes its time."""
        tc(host, "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", f"{mbit}mbit", "burst", "16kb",
           "latency", "2s")  # fmt: skip

    def heal(self) -> None:
        """All cables are as they were."""
        for host in self.hosts.values():
            with suppress(OSError):  # it was not slowed
                tc(host, "qdisc", "del", "dev", "eth0", "root")
        for here, there in permutations(self.hosts.values(), 2):
            told = json.loads(ip("-n", here.inside[-1], "-j", "neigh", "show", "to", there.address) or "[]")
            if any(one.get("lladdr") == NOWHERE for one in told):
                self._neighbour(here, "del", there)

    def _neighbour(self, here: Host, what: str, there: Host, *more: str) -> None:
        ip("-n", here.inside[-1], "neigh", what, there.address, "dev", "eth0", *more)

    def close(self) -> None:
        remove(self._number)


def remove(number: int) -> None:
    """Everything that bears the number: processes, namespaces with their cables, the bridge."""
    for space in [name for name, of in spaces() if of == number]:
        for process in ip("netns", "pids", space).split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        ip("netns", "del", space)
    if number in bridges():
        ip("link", "del", f"kvf{number}")


def spaces() -> list[tuple[str, int]]:
    """The namespaces that are a test's, with its number."""
    names = [one["name"] for one in json.loads(ip("-j", "netns", "list") or "[]")]
    return [(name, int(found[1])) for name in names if (found := OURS.fullmatch(name))]


def bridges() -> set[int]:
    names = [one["ifname"] for one in json.loads(ip("-j", "link", "show", "type", "bridge") or "[]") if one]
    return {int(found[1]) for name in names if (found := OURS.fullmatch(name))}


def can_make_namespaces() -> bool:
    """Whether this process may, and `ip` is there; tried in a namespace of its own name."""
    try:
        remove_leftovers()
        ip("netns", "add", space := f"kvf0-{os.getpid()}")
        ip("netns", "del", space)
    except (OSError, ValueError):
        return False
    return True


def remove_leftovers() -> None:
    """What killed runs left behind."""
    for number in {of for _, of in spaces()} | bridges():
        if (lock := hold(number)) is not None:
            with lock:
                remove(number)


def hold(number: int) -> IO | None:
    """The lock of a number, as long as it is open; None if another run has it."""
    folder = Path(f"/tmp/kvferry-hosts-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = open(folder / str(number), "ab")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


@contextmanager
def network(*names: str) -> Iterator[Loopback]:
    """Hosts of these names, until the end."""
    kind = Namespaces if can_make_namespaces() else Loopback
    number, lock = next((number, lock) for number in NUMBERS if (lock := hold(number)) is not None)
    with lock:
        try:
            net = kind(number)
            for name in names:
                net.add(name)
            print(f"hosts: {', '.join(f'{one.name} {one.address}' for one in net.hosts.values())}"
                  + ("" if net.can_cut else " (no namespaces can be made here; no cable can be cut)"))  # fmt: skip
            yield net
        finally:
            if kind is Namespaces:
                remove(number)
