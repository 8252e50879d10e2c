"""Time as a value that is passed in, so that tests can turn it."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds on a monotonic scale; only differences mean anything."""

    def now(self) -> float: ...


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()


class WallClock:
    """Seconds since 1970, to compare with a date that somebody wrote down. It may be set, and jump."""

    def now(self) -> float:
        return time.time()


class ManualClock:
    """A clock that stands still until it is advanced."""

    def __init__(self, start: float = 0.0):
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds
