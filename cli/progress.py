"""How a start is shown: who is doing what, in plain words. Bars on a terminal, log lines anywhere else; on stderr."""

import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kvferry.common.clock import Clock, MonotonicClock
from kvferry.common.config import LogConfig
from kvferry.common.process import Note, Notifier

STEPS: Mapping[str, str] = MappingProxyType(
    {
        "start": "starting",
        "make": "making the demo model",
        "fetch": "fetching the model from the hub",
        "import": "loading its libraries",
        "hash": "taking the weights' fingerprint",
        "weights": "reading the weights",
        "check": "checking the model; a machine's first start compiles kernels here",
        "prefault": "taking memory for the store",
        "tokenizer": "reading the tokenizer",
        "wait": "waiting for the workers",
    }
)
OFTEN_SHORT = ("fetch",)  # told of only once it takes long
SILENT_S = 3.0  # after so long without a line, one says what is being done
LOOK_EVERY_S = 0.5
LONG = 0.1  # of what the start has taken: a start that takes very long is told of less often
SILENT_MOST_S = 60.0

log = logging.getLogger(__name__)


def display(logs: LogConfig) -> "Bars | Lines":
    return Bars() if sys.stderr.isatty() and logs.log_format != "json" else Lines()


def words_of(stage: str) -> str:
    """A step for people; one that is not known here goes by its own name."""
    return STEPS.get(stage, stage)


@dataclass
class Step:
    """What a process is at, and since when."""

    note: Note
    since: float

    def told(self, name: str, now: float) -> str:
        part = f", {100 * self.note.done // self.note.total}%" if self.note.total > 1 else ""
        words = words_of(self.note.stage).partition(";")[0]
        return f"{name} {words}{part} ({now - self.since:.0f} s)".lstrip()


class Lines:
    """One line when a step begins and one when a process is ready; and while a step takes long, every few seconds one
    that says so, from a thread, as whoever starts may be busy. Children write their own to the same stderr."""

    tell = None

    def __init__(self, clock: Clock | None = None):
        self._clock = clock or MonotonicClock()
        self._steps: dict[str, Step] = {}  # of each process that is starting
        self._lock = threading.Lock()
        self._began = self._last = self._clock.now()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="kvferry-progress", daemon=True).start()

    def plan(self, lines: Sequence[str]) -> None:
        for line in lines:
            log.info("%s", line)

    def show(self, name: str, note: Note) -> None:
        """`name` is empty where the log says who it is. A note that says nothing ends what is shown of it; a failure is
        told by whoever started it."""
        with self._lock:
            now, before = self._clock.now(), self._steps.get(name)
            if before is not None and before.note.stage == note.stage:
                before.note = note
                return
            if note.stage:
                self._steps[name] = Step(note, now)
            else:
                self._steps.pop(name, None)
            if note.ready or (note.stage and note.stage not in OFTEN_SHORT):
                self._last = now
                log.info("%s", f"{name}: {'ready' if note.ready else words_of(note.stage)}".removeprefix(": "))

    def remind(self) -> None:
        """Say what is being done, if nothing was said for long."""
        with self._lock:
            now = self._clock.now()
            patience = min(max(SILENT_S, LONG * (now - self._began)), SILENT_MOST_S)
            if self._steps and now - self._last >= patience:
                self._last = now
                log.info("not ready yet: %s", "; ".join(step.told(name, now) for name, step in self._steps.items()))

    def close(self) -> None:
        """No reminders from here on."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_EVERY_S):
            self.remind()


class Alone(Notifier):
    """For a process that no other one waits for: how its start goes is told in its log."""

    def __init__(self) -> None:
        super().__init__(None)
        self._lines = Lines()

    def progress(self, stage: str, done: int, total: int) -> None:
        self._lines.show("", Note(stage, done, total))

    def ready(self) -> None:
        self._lines.show("", Note(ready=True))
        self._lines.close()

    def failed(self, sentence: str) -> bool:
        self._lines.close()
        return False


class Bars:
    """One bar a process and step."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description:<36}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bars: dict[tuple[str, str], int] = {}
        self._endless: dict[str, str] = {}  # the step of a process that does not say how far it is
        self._progress.start()

    def plan(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._progress.console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)

    def tell(self, line: str) -> None:
        """A line of a child's log, above the bars."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(self, name: str, note: Note) -> None:
        if self._endless.get(name) not in (None, note.stage):
            self._progress.remove_task(self._bars.pop((name, self._endless.pop(name))))
        if not note.stage:
            return
        if (name, note.stage) not in self._bars:
            words = words_of(note.stage).partition(";")[0]
            self._bars[name, note.stage] = self._progress.add_task(f"{name} {words}", total=None)
        if not note.total:
            self._endless[name] = note.stage
        self._progress.update(self._bars[name, note.stage], completed=note.done, total=note.total or None)

    def close(self) -> None:
        """Take the bars away. What is shown after that is not seen."""
        self._progress.stop()
