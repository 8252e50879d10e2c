"""Who has each slot of the arena: free, being written, committed or quarantined. Every slot is exactly one of them.

A slot in `writing` may be written by its owner's process at any moment, whatever became of the reservation it was
granted under. So it leaves that state only when its owner says so (commit, abort) or some time after the owner's
socket closed.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TypeVar

import msgspec

from kvferry.common.hashing import BlockName

MAX_QUARANTINED = 64
ORPHAN_S = 1.0  # a slot is used again so long after its writer's socket closed
STEP = 1024  # things that one step of a check looks at

Thing = TypeVar("Thing")


class Writing(msgspec.Struct):
    """One slot granted for writing. `owner` is a connection; None once its socket closed."""

    slot: int
    name: BlockName
    tenant: str
    owner: int | None


def in_steps(things: Iterable[Thing]) -> Iterator[list[Thing]]:
    """The things, in order, as many at a time as one step of a check looks at."""
    rest = iter(things)
    while some := list(islice(rest, STEP)):
        yield some


class SlotTable:
    """The partition of the arena's slots; there are none before `divide`. Tenants are only labels that it counts."""

    def __init__(self) -> None:
        self.slots = 0
        self.free: list[int] = []
        self.writing: dict[int, Writing] = {}
        self.committed: dict[int, str] = {}  # slot -> tenant
        self.quarantined: deque[int] = deque()
        self.held: Counter[str] = Counter()  # slots in writing or committed, by tenant; no zero entries
        self._orphans: deque[tuple[float, int]] = deque()  # (when it becomes free, slot), in that order

    def divide(self, slots: int) -> None:
        """Set, once, how many slots there are. All of them are free."""
        if self.slots:
            raise ValueError(f"the arena is divided already, into {self.slots} slots")
        self.slots = slots
        self.free = list(range(slots - 1, -1, -1))

    def grant(self, name: BlockName, tenant: str, owner: int) -> Writing:
        """Take a free slot (the caller made sure that there is one) into writing."""
        writing = Writing(self.free.pop(), name, tenant, owner)
        self.writing[writing.slot] = writing
        self.held[tenant] += 1
        return writing

    def commit(self, writing: Writing) -> None:
        del self.writing[writing.slot]
        self.committed[writing.slot] = writing.tenant

    def abort(self, writing: Writing) -> None:
        del self.writing[writing.slot]
        self._drop(writing.tenant)
        self.free.append(writing.slot)

    def orphan(self, owner: int, now: float) -> None:
        """The socket of `owner` closed: what it was writing becomes free a second from now."""
        for writing in self.writing.values():
            if writing.owner == owner:
                writing.owner = None
                self._orphans.append((now + ORPHAN_S, writing.slot))

    def reclaim(self, now: float) -> bool:
        """Free the orphans whose time has come. Whether there were any."""
        due = []
        while self._orphans and self._orphans[0][0] <= now:
            due.append(self._orphans.popleft()[1])
        for slot in due:
            self.abort(self.writing[slot])
        return bool(due)

    def evict(self, slot: int) -> None:
        self._drop(self.committed.pop(slot))
        self.free.append(slot)

    def quarantine(self, slot: int) -> None:
        """Set a slot aside: its memory may be bad, or somebody may be writing where it should not. The oldest one
        comes back when there are too many, since most causes are of the past by then."""
        self._drop(self.committed.pop(slot))
        self.quarantined.append(slot)
        if len(self.quarantined) > min(MAX_QUARANTINED, max(1, self.slots // 8)):
            self.free.append(self.quarantined.popleft())

    def checking(self, committed: Iterable[int]) -> Iterator[None]:
        """A check in steps. `committed`: the slots that the index believes to be committed. Raises RuntimeError."""
        met = bytearray(self.slots)
        for slots in in_steps(chain(self.free, self.writing, self.committed, self.quarantined)):
            for slot in slots:
                if not 0 <= slot < self.slots or met[slot]:
                    raise RuntimeError(self._no_partition())
                met[slot] = 1
            yield
        if 0 in met:
            raise RuntimeError(self._no_partition())
        left = len(self.committed)
        for slots in in_steps(committed):
            for slot in slots:
                left -= met[slot]
                if slot not in self.committed or not met[slot]:
                    raise RuntimeError("the index and the slot table disagree on which slots are committed")
                met[slot] = 0
            yield
        if left:
            raise RuntimeError("the index and the slot table disagree on which slots are committed")
        held = Counter(writing.tenant for writing in self.writing.values())
        for tenants in in_steps(self.committed.values()):
            held.update(tenants)
            yield
        if held != self.held or 0 in self.held.values():
            raise RuntimeError("slots held by each tenant are miscounted")
        if {slot for _, slot in self._orphans} != {w.slot for w in self.writing.values() if w.owner is None}:
            raise RuntimeError("slots without an owner are not those that wait to be reclaimed")

    def _no_partition(self) -> str:
        return (
            f"slots are not a partition: {len(self.free)} free + {len(self.writing)} writing + "
            f"{len(self.committed)} committed + {len(self.quarantined)} quarantined, {self.slots} in all"
        )

    def _drop(self, tenant: str) -> None:
        self.held[tenant] -= 1
        if not self.held[tenant]:
            del self.held[tenant]
