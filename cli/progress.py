"""How a start is shown: the plan and bars on a terminal, log lines anywhere else. Always on stderr."""

import logging
import sys
from collections.abc import Sequence

from kvferry.common.config import LogConfig
from kvferry.common.process import Note

log = logging.getLogger(__name__)


def display(logs: LogConfig) -> "Bars | Lines":
    return Bars() if sys.stderr.isatty() and logs.log_format != "json" else Lines()


class Lines:
    """One line when a stage begins and one when a process is ready. Children write their own to the same stderr."""

    tell = None

    def __init__(self) -> None:
        self._shown: set[tuple[str, str]] = set()

    def plan(self, lines: Sequence[str]) -> None:
        for line in lines:
            log.info("%s", line)

    def show(self, name: str, note: Note) -> None:
        stage = "ready" if note.ready else note.stage
        if stage and (name, stage) not in self._shown:
            self._shown.add((name, stage))
            log.info("%s: %s", name, stage)

    def close(self) -> None:
        self._shown.clear()


class Bars:
    """One bar a process and stage."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bars: dict[tuple[str, str], int] = {}
        self._progress.start()

    def plan(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._progress.console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)

    def tell(self, line: str) -> None:
        """A line of a child's log, above the bars."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(self, name: str, note: Note) -> None:
        if not note.stage:
            return
        if (name, note.stage) not in self._bars:
            self._bars[name, note.stage] = self._progress.add_task(f"{name} {note.stage}", total=None)
        self._progress.update(self._bars[name, note.stage], completed=note.done, total=note.total or None)

    def close(self) -> None:
        """Take the bars away. What is shown after that is not seen."""
        self._progress.stop()
