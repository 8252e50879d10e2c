"""What a node has still to tell the directory, and what it told it lately."""

from collections import deque
from collections.abc import Iterable, Sequence

from kvferry.common.clock import Clock
from kvferry.common.hashing import BlockName
from kvferry.kvstore.directory import Key

MAX_WAITING = 65536
MAX_LATELY = 65536
LATELY_S = 300.0


class Announcements:
    """A queue that drops its oldest when it is full. A name that was queued in the last `lately_s` is not queued again,
    nor, at most, in three times that; of those, two times `max_lately` are remembered."""

    def __init__(
        self, clock: Clock, max_waiting: int = MAX_WAITING, max_lately: int = MAX_LATELY, lately_s: float = LATELY_S
    ):
        self.dropped = 0
        self._clock = clock
        self._max_waiting = max_waiting
        self._max_lately = max_lately
        self._lately_s = lately_s
        self._waiting: deque[Key] = deque()
        self._lately: set[BlockName] = set()
        self._before: set[BlockName] = set()  # what `_lately` was until `_turned`
        self._turned = clock.now()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, keys: Iterable[Key]) -> None:
        if (passed := self._clock.now() - self._turned) >= self._lately_s:
            self._turn()
            if passed >= 2 * self._lately_s:
                self._before.clear()
        for key in keys:
            if key.name not in self._lately and key.name not in self._before:
                if len(self._lately) == self._max_lately:
                    self._turn()
                self._lately.add(key.name)
                self._waiting.append(key)
        self._fit()

    def take(self, most: int) -> list[Key]:
        """The oldest of the queue."""
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def put_back(self, keys: Sequence[Key]) -> None:
        """What was taken and could not be told."""
        self._waiting.extendleft(reversed(keys))
        self._fit()

    def forget(self) -> None:
        """What was told may be gone: whatever is used next is told again."""
        self._lately.clear()
        self._before.clear()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the bounds hold."""
        if max(len(self._lately), len(self._before)) > self._max_lately or len(self._waiting) > self._max_waiting:
            raise RuntimeError(
                f"{len(self._lately)} and {len(self._before)} names are remembered, {len(self._waiting)} queued"
            )
        if self._lately & self._before:
            raise RuntimeError("a name was queued twice")

    def _turn(self) -> None:
        self._before, self._lately = self._lately, set()
        self._turned = self._clock.now()

    def _fit(self) -> None:
        """Drop what is too much; it may be queued again at once."""
        while len(self._waiting) > self._max_waiting:
            name = self._waiting.popleft().name
            self._lately.discard(name)
            self._before.discard(name)
            self.dropped += 1
