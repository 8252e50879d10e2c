"""The supervisor over small real processes: order, restarts, giving up, and that nothing is left."""

import asyncio
import itertools
import os
import signal
import sys
import time

import psutil
import pytest

from kvferry.cli import supervisor
from kvferry.cli.supervisor import ChildSpec, Supervisor, backoff_s
from kvferry.common.clock import MonotonicClock
from kvferry.common.errors import ConfigError, Unavailable

CHILD = """
import os, signal, sys, time
from pathlib import Path
fd = int(sys.argv[sys.argv.index("--notify-fd") + 1])
folder, name, lives = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
starts = folder / f"{name}.starts"
with open(starts, "a") as f:
    f.write(f"{os.getpid()} {time.monotonic()}\\n")
life = lives[min(len(starts.read_text().splitlines()), len(lives)) - 1]
def end(*_):
    if life == "drains":
        time.sleep(1.2)
    with open(folder / "ends", "a") as f:
        f.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if life == "stubborn" else end)
if life == "silent":
    sys.exit(3)
if life == "refuses":
    os.write(fd, b'{"failed":"the moon is full"}\\n')
    sys.exit(2)
os.write(fd, b'{"stage":"weights","done":1,"total":2}\\n')
time.sleep(0.05)
os.write(fd, b'{"ready":true}\\n')
if life == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    time.sleep(10)
"""


class Run:
    """One supervised system of scripts; `lives` says what each start of a child does, the last one for the rest."""

    def __init__(self, folder, drain_s: float = 0.0, **lives: str):
        self.folder = folder
        self.notes: list = []
        self.ready = asyncio.Event()
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        specs = {
            name: ChildSpec(
                name,
                (sys.executable, "-c", CHILD, str(folder), name, life),
                restart=name != "router",
                drain_s=drain_s if name == "router" else 0.0,
                meanwhile="nothing is found" if name == "store" else "",
            )
            for name, life in lives.items()
        }
        stages = [[specs[name] for name in stage if name in specs] for stage in (("store",), ("worker", "router"))]
        self._supervisor = Supervisor(stages, lambda name, note: self.notes.append((name, note)), MonotonicClock())

    def go(self) -> asyncio.Task:
        return asyncio.create_task(self._supervisor.run(self.stop, self.hurry, self.ready.set))

    def starts(self, name: str) -> list[tuple[int, float]]:
        path = self.folder / f"{name}.starts"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), float(at)) for pid, at in map(str.split, lines)]

    def ends(self) -> list[str]:
        return (self.folder / "ends").read_text().splitlines()

    def check_nothing_left(self) -> None:
        for name in ("store", "worker", "router"):
            assert not [pid for pid, _ in self.starts(name) if psutil.pid_exists(pid)]
        assert not psutil.Process().children()


async def until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(supervisor, "STOP_S", 0.6)
    monkeypatch.setattr(supervisor, "WORKERS_STOP_S", 0.6)
    monkeypatch.setattr(supervisor, "STORE_STOP_S", 0.6)


@pytest.mark.parametrize(("drain_s", "first"), [(0.2, False), (1.5, True)])
def test_the_front_has_the_time_that_it_may_take_to_drain(tmp_path, drain_s, first):
    """It takes 1.2 s: the others serve it until then, if that is what it may take."""

    async def scenario():
        run = Run(tmp_path, drain_s, store="lives", worker="lives", router="drains")
        work = run.go()
        await asyncio.wait_for(run.ready.wait(), 10)
        run.stop.set()
        await asyncio.wait_for(work, 10)
        assert (run.ends()[0] == "router") == first
        run.check_nothing_left()

    asyncio.run(scenario())


def test_starts_in_order_and_ends_in_the_opposite_one(tmp_path):
    async def scenario():
        run = Run(tmp_path, store="lives", worker="lives", router="lives")
        fds = len(os.listdir("/proc/self/fd"))
        work = run.go()
        await asyncio.wait_for(run.ready.wait(), 10)
        assert run.starts("store")[0][1] + 0.05 < min(run.starts("worker")[0][1], run.starts("router")[0][1])
        names = {name for name, note in run.notes if note.stage == "weights" and note.total == 2}
        assert names == {"store", "worker", "router"}
        run.stop.set()
        await asyncio.wait_for(work, 5)
        assert run.ends() == ["router", "worker", "store"]
        run.check_nothing_left()
        assert len(os.listdir("/proc/self/fd")) == fds

    asyncio.run(scenario())


def test_a_dead_worker_and_store_are_started_again(tmp_path, caplog):
    async def scenario():
        run = Run(tmp_path, store="lives", worker="lives", router="lives")
        work = run.go()
        await asyncio.wait_for(run.ready.wait(), 10)
        for name in ("worker", "store"):
            os.kill(run.starts(name)[-1][0], signal.SIGKILL)
            await until(lambda name=name: len(run.starts(name)) == 2)
        await until(lambda: len([1 for _, note in run.notes if note.ready]) == 5)
        assert not work.done()
        assert len(run.starts("router")) == 1
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert told[0] == "worker was killed by SIGKILL; it is started again in 0.02 s (start 1 of 5)"
        assert told[1].endswith("(start 1 of 5); until it is back, nothing is found")
        run.stop.set()
        await asyncio.wait_for(work, 5)
        run.check_nothing_left()

    asyncio.run(scenario())


def test_restarts_are_exhausted(tmp_path):
    async def scenario():
        run = Run(tmp_path, store="lives", worker="lives,dies,silent,refuses,dies", router="lives")
        work = run.go()
        await asyncio.wait_for(run.ready.wait(), 10)
        os.kill(run.starts("worker")[0][0], signal.SIGKILL)
        with pytest.raises(Unavailable, match=r"^worker was killed by SIGKILL, and 5 restarts did not help$"):
            await asyncio.wait_for(work, 20)
        times = [at for _, at in run.starts("worker")]
        assert len(times) == 6
        pauses = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
        assert all(pause >= 0.02 * 2**number for number, pause in enumerate(pauses, start=1))
        run.check_nothing_left()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("life", "kind", "sentence"),
    [
        ("refuses", ConfigError, "^worker did not start: the moon is full$"),
        ("silent", Unavailable, "^worker did not start: it ended with exit code 3 without a word$"),
    ],
)
def test_a_first_start_that_fails_ends_everything(tmp_path, life, kind, sentence):
    async def scenario():
        run = Run(tmp_path, store="lives", worker=life, router="lives")
        with pytest.raises(kind, match=sentence):
            await asyncio.wait_for(run.go(), 10)
        assert len(run.starts("worker")) == 1
        assert not run.ready.is_set()
        run.check_nothing_left()

    asyncio.run(scenario())


def test_the_end_of_the_router_ends_everything(tmp_path):
    async def scenario():
        run = Run(tmp_path, store="lives", worker="lives", router="lives")
        work = run.go()
        await asyncio.wait_for(run.ready.wait(), 10)
        os.kill(run.starts("router")[0][0], signal.SIGKILL)
        with pytest.raises(Unavailable, match=r"^router was killed by SIGKILL$"):
            await asyncio.wait_for(work, 5)
        run.check_nothing_left()

    asyncio.run(scenario())


@pytest.mark.parametrize("hurry", [False, True])
def test_who_does_not_end_is_killed(tmp_path, hurry):
    async def scenario():
        run = Run(tmp_path, store="lives", worker="stubborn", router="stubborn")
        work = run.go()
        await asyncio.wait_for(run.ready.wait(), 10)
        os.kill(run.starts("store")[0][0], signal.SIGSTOP)
        began = time.monotonic()
        run.stop.set()
        if hurry:
            await asyncio.sleep(0.05)
            run.hurry.set()
        await asyncio.wait_for(work, 5)
        took = time.monotonic() - began
        assert took < 0.5 if hurry else 1.0 < took < 2.5
        run.check_nothing_left()

    asyncio.run(scenario())


def test_stop_during_the_start(tmp_path):
    async def scenario():
        run = Run(tmp_path, store="lives", worker="lives", router="lives")
        work = run.go()
        await until(lambda: run.starts("store"))
        run.stop.set()
        await asyncio.wait_for(work, 5)
        assert not run.ready.is_set()
        run.check_nothing_left()

    asyncio.run(scenario())


def test_backoff(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.2)
    assert [backoff_s(n) for n in range(1, 8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_lines_of_a_child_are_told_whole():
    """However they arrive: in pieces, many at once, longer than any buffer, without an end."""

    async def scenario():
        stream, told = asyncio.StreamReader(limit=16), []
        telling = asyncio.create_task(supervisor.tell_lines(stream, told.append))
        for piece in (b"one\ntw", b"o\n\n", b"x" * 200_000, b"\n", "ü".encode()[:1]):
            stream.feed_data(piece)
            await asyncio.sleep(0)
        stream.feed_eof()
        await telling
        assert told == ["one", "two", "", "x" * 200_000, "\ufffd"]

    asyncio.run(scenario())
