"""A breaker: what is not well is left alone, until a try in the background finds it well again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from kvferry.common.clock import Clock

log = logging.getLogger(__name__)

FIRST_S = 0.2  # from a failure to the first try
MOST_S = 5.0  # between tries; each waits twice as long as the one before
CALM_S = 10.0  # what fails again sooner than this after it was mended waits on from where it was


class Breaker:
    """Open until `start` or a later try mends it. `mend` returns what is wrong, or nothing.

    `what` begins the log lines: a warning when it opens, one more when a try finds a fault of another kind, and what
    happened when it closes again. A fault's kind is what stands before its colon, or all of it.
    """

    def __init__(
        self,
        what: str,
        mend: Callable[[], Awaitable[str]],
        clock: Clock,
        first_s: float = FIRST_S,
        most_s: float = MOST_S,
    ):
        self.closed = False
        self.opened = 0  # times
        self.last_fault = ""
        self._what = what
        self._mend = mend
        self._clock = clock
        self._first_s = first_s
        self._most_s = most_s
        self._wait_s = first_s
        self._since = clock.now()  # when it last opened or closed
        self._is_closed = asyncio.Event()
        self._mending: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Try once, and go on in the background if that fails."""
        if fault := await self._mend():
            self._open(fault)
        else:
            self._close()

    def fail(self, fault: str) -> None:
        """Somebody who used it saw a fault, a sentence."""
        self.last_fault = fault
        if self.closed:
            if self._clock.now() - self._since >= CALM_S:
                self._wait_s = self._first_s
            self._open(fault)

    async def wait_closed(self) -> None:
        await self._is_closed.wait()

    async def close(self) -> None:
        """Open for good."""
        self.closed = False
        self._is_closed.clear()
        if self._mending is not None:
            self._mending.cancel()
            await asyncio.gather(self._mending, return_exceptions=True)

    def check_integrity(self) -> None:
        """From `start` to `close`: raise RuntimeError unless it is being mended if open, and not if closed."""
        mending = self._mending is not None and not self._mending.done()
        if self.closed != self._is_closed.is_set() or self.closed == mending:
            raise RuntimeError(f"a breaker is closed: {self.closed}, and is being mended: {mending}")

    def _open(self, fault: str) -> None:
        self.closed = False
        self.opened += 1
        self.last_fault = fault
        self._since = self._clock.now()
        self._is_closed.clear()
        log.warning("%s is not used until it works again: %s", self._what, fault)
        self._mending = asyncio.create_task(self._mend_for_ever())

    def _close(self) -> None:
        self.closed = True
        self._since = self._clock.now()
        self._is_closed.set()

    async def _mend_for_ever(self) -> None:
        told = self.last_fault
        while True:
            await asyncio.sleep(self._wait_s)
            self._wait_s = min(2 * self._wait_s, self._most_s)
            if not (fault := await self._mend()):
                break
            self.last_fault = fault
            if fault.partition(":")[0] != told.partition(":")[0]:
                log.warning("%s still does not work: %s", self._what, fault)
                told = fault
        log.info("%s is used again, after %.1f s", self._what, self._clock.now() - self._since)
        self._mending = None
        self._close()
