"""Child processes that belong together: started in order, restarted when they die, ended together."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from kvferry.cli.run import EXIT_CONFIG
from kvferry.common.clock import Clock
from kvferry.common.config import foreign_environment
from kvferry.common.errors import ConfigError, Unavailable
from kvferry.common.process import Note

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
STEADY_S = 30.0  # who lived so long starts again with the first backoff
MAX_FAILURES = 5
STOP_S = 0.5  # to end, beyond what a process takes to drain
WORKERS_STOP_S, STORE_STOP_S = 2.0, 0.5
LAST_LINES_S = 0.5  # what an ended process wrote is there; somebody who inherited its stderr may hold it open

Tell = Callable[[str], None] | None

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChildSpec:
    """A process to keep. `restart`: start it again when it ends. One that is not restarted is the front, which the
    others serve: its end is the end of everything, and it is told to end before them. `drain_s`: how long it may then
    finish what is under way. `meanwhile`: what holds while it is away, for people."""

    name: str
    argv: tuple[str, ...]
    restart: bool = True
    drain_s: float = 0.0
    meanwhile: str = ""


def backoff_s(failures: int) -> float:
    """The pause before the start that follows the `failures`-th failure in a row, from 1."""
    return min(FIRST_BACKOFF_S * 2 ** (failures - 1), MAX_BACKOFF_S)


class Child:
    """One process at a time, in a process group of its own so that a terminal's Ctrl-C does not reach it."""

    def __init__(self, spec: ChildSpec, report: Callable[[str, Note], None], tell: Tell):
        self.spec = spec
        self.was_ready = asyncio.Event()
        self._report, self._tell = report, tell
        self._process: asyncio.subprocess.Process | None = None
        self._telling: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """None while no process runs."""
        return self._process.pid if self.alive else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the process and wait until it says that it is ready. When it has ended instead, raises with what it
        says: ConfigError if that is that it was told something wrong, else Unavailable."""
        self._report(self.spec.name, Note("start"))
        read_end, write_end = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.argv,
                *("--notify-fd", str(write_end), "--parent-pid", str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE if self._tell else None,
                pass_fds=(write_end,),
                env=foreign_environment(),
                process_group=0,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        if self._tell:
            self._telling = asyncio.create_task(tell_lines(self._process.stderr, self._tell))
        if not (sentence := await self._listen(read_end)):
            self.was_ready.set()
            return
        kind = ConfigError if self._process.returncode == EXIT_CONFIG else Unavailable
        raise kind(f"{self.spec.name} did not start: {sentence}")

    async def _listen(self, read_end: int) -> str:
        """Pass progress on until the child is ready (the answer is empty) or has failed (its sentence). The pipe is
        closed then; a child that writes to it afterwards notices and stops."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb")
        )
        try:
            async for line in reader:
                note = msgspec.json.decode(line, type=Note)
                self._report(self.spec.name, note)
                if note.ready:
                    return ""
                if note.failed:
                    await self.ended()
                    return note.failed
            return f"it {await self.ended()} without a word"
        finally:
            transport.close()

    async def ended(self) -> str:
        """Wait for the end; how it ended, as a verb."""
        code = await self._process.wait()
        if self._telling:
            await asyncio.wait({self._telling}, timeout=LAST_LINES_S)
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process group, if it is there."""
        if self.alive:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                log.debug("%s ended by itself just now", self.spec.name)


class Supervisor:
    """Keeps `stages` of processes: those of one start together, after those before them are ready."""

    def __init__(
        self,
        stages: Sequence[Sequence[ChildSpec]],
        report: Callable[[str, Note], None],
        clock: Clock,
        tell: Tell = None,
    ):
        """`report` gets what a child says of its start, `tell` each line that it writes to stderr; without `tell` it
        writes to ours."""
        self._stages = [[Child(spec, report, tell) for spec in stage] for stage in stages]
        self._children = [child for stage in self._stages for child in stage]
        self._clock = clock

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event, on_ready: Callable[[], None]) -> None:
        """Keep everything running until `stop`, then end it: the front, within what it may take to drain and STOP_S,
        the others within WORKERS_STOP_S, and last the first stage, which they use; or all at once on `hurry`.

        `on_ready` is called when all are ready for the first time. Raises Unavailable, after everything has ended, when
        a first start fails, a child that is not restarted ends, or restarts are exhausted.
        """
        work = asyncio.create_task(self._keep_all(on_ready))
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, stopped):
                task.cancel()
            await asyncio.gather(work, stopped, return_exceptions=True)
            await self._end_all(hurry)

    async def _keep_all(self, on_ready: Callable[[], None]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for stage in self._stages:
                    for child in stage:
                        group.create_task(self._keep(child))
                    for child in stage:
                        await child.was_ready.wait()
                on_ready()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first is why the others were cancelled

    async def _keep(self, child: Child) -> None:
        """Run a child, again and again if it may be."""
        await child.start()
        failures = 0
        while True:
            ready_at = self._clock.now()
            end = await child.ended()
            if not child.spec.restart:
                raise Unavailable(f"{child.spec.name} {end}")
            if self._clock.now() - ready_at >= STEADY_S:
                failures = 0
            failures = await self._restart(child, failures, end)

    async def _restart(self, child: Child, failures: int, end: str) -> int:
        """Start a child until it is ready. The number of failures in a row, this one included."""
        while True:
            failures += 1
            if failures > MAX_FAILURES:
                raise Unavailable(f"{child.spec.name} {end}, and {MAX_FAILURES} restarts did not help")
            log.warning(
                "%s %s; it is started again in %g s (start %d of %d)%s", child.spec.name, end, backoff_s(failures),
                failures, MAX_FAILURES, child.spec.meanwhile and f"; until it is back, {child.spec.meanwhile}",
            )  # fmt: skip
            await asyncio.sleep(backoff_s(failures))
            try:
                await child.start()
            except (ConfigError, Unavailable) as error:
                end = str(error).removeprefix(f"{child.spec.name} ")
            else:
                log.info("%s is back", child.spec.name)
                return failures

    async def _end_all(self, hurry: asyncio.Event) -> None:
        front = [child for child in self._children if not child.spec.restart]
        draining_s = max([child.spec.drain_s for child in front], default=0.0) + STOP_S
        first, *rest = self._stages
        later = [child for stage in rest for child in stage]
        for children, patience_s in ((front, draining_s), (later, WORKERS_STOP_S), (first, STORE_STOP_S)):
            for child in children:
                child.signal(signal.SIGTERM)
            await _gone(children, patience_s, hurry)
        for child in self._children:
            if child.alive:
                log.warning("%s does not end; it is killed", child.spec.name)
            child.signal(signal.SIGKILL)
        await _gone(self._children, None, asyncio.Event())


async def tell_lines(stream: asyncio.StreamReader, tell: Callable[[str], None]) -> None:
    """Each line of a stream, however long, until its end."""
    begun = b""
    while piece := await stream.read(2**16):
        *whole, begun = (begun + piece).split(b"\n")
        for line in whole:
            tell(line.decode(errors="replace"))
    if begun:
        tell(begun.decode(errors="replace"))


async def _gone(children: Sequence[Child], patience_s: float | None, hurry: asyncio.Event) -> None:
    """Wait until all have ended, patience is over, or there is a hurry."""
    ends = {asyncio.create_task(child.ended()) for child in children if child.alive}
    if not ends:
        return
    hurried = asyncio.create_task(hurry.wait())
    all_ended = asyncio.create_task(asyncio.wait(ends))
    await asyncio.wait({all_ended, hurried}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
    tasks = (all_ended, hurried, *ends)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
