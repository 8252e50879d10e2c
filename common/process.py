"""A process and its place on the machine: the cores it may use, and the process that started it (progress and readiness
go upwards; it never outlives its parent)."""

import ctypes
import os
import signal
from pathlib import Path

import msgspec

from kvferry.common.errors import ConfigError

PR_SET_PDEATHSIG = 1  # prctl(2)


CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(cpu_max: Path = CPU_MAX) -> int:
    """How many cores this process may keep busy: its affinity, or its cgroup's CPU quota (v2) where that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
    except OSError:  # no such cgroup
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


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

    def failed(self, sentence: str) -> None:
        self._send(Note(failed=sentence))

    def _send(self, note: Note) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, msgspec.json.encode(note) + b"\n")
        except BrokenPipeError:
            self._fd = None  # the parent went; die_with_parent ends us


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGTERM when the parent ends, however it ends. Linux. Raises ConfigError when the parent
    has ended already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        raise ConfigError("the process that started this one has ended")
