"""A process and its place on the machine: the cores it may use, and the process that started it (progress and readiness
go upwards; it never outlives its parent)."""

import ctypes
import os
import resource
import signal
import socket
import stat
from pathlib import Path

import msgspec

from kvferry.common.errors import ConfigError

PR_SET_PDEATHSIG = 1  # prctl(2)
CGROUP = Path("/sys/fs/cgroup")
CPU_MAX = CGROUP / "cpu.max"
MOST_DESCRIPTORS = 2**14 + 2**8
MEMINFO = Path("/proc/meminfo")


def usable_cores(cpu_max: Path = CPU_MAX) -> int:
    """How many cores this process may keep busy: its affinity, or its cgroup's CPU quota (v2) where that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
    except OSError:  # no such cgroup
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def take_descriptors() -> None:
    """Let this process have as many file descriptors as the system allows it, up to `MOST_DESCRIPTORS`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MOST_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def available_memory(cgroup: Path = CGROUP, meminfo: Path = MEMINFO) -> int:
    """Bytes of memory that this process and its children may still take: what the host has available, or what its
    cgroup's limit (v2) leaves where that is less."""
    told = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(told["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (cgroup / "memory.max").read_text().strip(), int((cgroup / "memory.current").read_text())
        counted = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:  # no such cgroup
        return available
    given_back = int(counted["inactive_file"])  # a cache of files: it goes when memory is asked for
    return available if limit == "max" else max(0, min(available, int(limit) - used + given_back))


def claim_socket_path(path: Path, what: str) -> None:
    """Make way for a socket at `path`: remove one that a dead process left. Raises ConfigError if a live one answers
    there, or if there is something else."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"{path} is there and is not a socket; give {what} another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(str(path))
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ConfigError(f"there is no folder {path.parent} for the socket of {what}; make it first") from None
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return
    except BlockingIOError:
        pass  # alive, with a full backlog
    except OSError as error:
        raise ConfigError(f"{path} cannot be used as a socket of {what}: {error.strerror}") from error
    raise ConfigError(f"another process answers at {path}; stop it first, or give {what} another path")


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line on the notify pipe. `stage` and `done`/`total` are progress; `ready` and `failed` end the start."""

    stage: str = ""
    done: int = 0
    total: int = 0
    ready: bool = False
    failed: str = ""


class Notifier:
    """Tells the parent, over an inherited pipe, how the start goes. Without a pipe it says nothing."""

    def __init__(self, fd: int | None):
        self._fd = fd

    def progress(self, stage: str, done: int, total: int) -> None:
        self._send(Note(stage=stage, done=done, total=total))

    def ready(self) -> None:
        self._send(Note(ready=True))

    def failed(self, sentence: str) -> bool:
        """Whether the parent was there to be told."""
        return self._send(Note(failed=sentence))

    def _send(self, note: Note) -> bool:
        if self._fd is None:
            return False
        try:
            os.write(self._fd, msgspec.json.encode(note) + b"\n")
        except BrokenPipeError:
            self._fd = None  # the parent listens no more, or went and die_with_parent ends us
        return self._fd is not None


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGTERM when the parent ends, however it ends. Linux. Raises ConfigError when the parent
    has ended already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        raise ConfigError("the process that started this one has ended")
