"""Which block goes when a slot is needed: the one replaceable unit of policy.

The index enforces the laws (leased blocks never, tail before head) by telling the policy which blocks may go at all:
committed, unleased, without a committed child. The policy only chooses among those.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Protocol

from kvferry.common.hashing import BlockName
from kvferry.kvstore.slots import in_steps

COMPACT_SLACK = 64  # stale heap records tolerated beyond one for each candidate, or for each tenant

Record = tuple[float, int, BlockName, str]  # last use, serial number, name, tenant: in the order of eviction


class EvictionPolicy(Protocol):
    """Pure bookkeeping; the index is its only caller and serialises the calls."""

    def add(self, name: BlockName, tenant: str, last_use: float) -> None:
        """`name` may be evicted from now on. It was used last at `last_use` (monotonic seconds)."""
        ...

    def remove(self, name: BlockName) -> None:
        """`name`, a candidate, may no longer be evicted: leased, given a child, or gone."""
        ...

    def grew(self, tenant: str, held: int) -> None:
        """`tenant` was given slots and has `held` now. Said before the next choice for another tenant."""
        ...

    def victim(self, tenant: str, held: Mapping[str, int], slots: int) -> BlockName | None:
        """The candidate that should make room for a block of `tenant`; it stays a candidate until removed.

        `held` counts the slots of each tenant that has any (committed and being written); `slots` is the arena's
        size. None: nothing may go.
        """
        ...

    def checking(self, candidates: Iterable[BlockName], held: Mapping[str, int]) -> Iterator[None]:
        """A check in steps. Raises RuntimeError unless exactly `candidates`, each one once, are known."""
        ...


class FairLru:
    """Least recently used first, each tenant guaranteed `slots // tenants` (the tenants that hold slots now).

    A tenant at or over its share loses its own blocks first, then those of others over theirs, and never takes from
    one within its share. A tenant below its share takes from those over theirs, and if nobody is, from anybody.

    Ties (a prefix is touched as one) go to the block that became a candidate first.

    Each tenant's candidates are a heap with lazy removal. So are the tenants: `_firsts` has, for each tenant, a record
    no younger than the first of its heap; `_over` has one for each that holds more than `_share`. A change and a choice
    are O(log n), but for one look at every tenant when the share falls.
    """

    def __init__(self) -> None:
        self._candidates: dict[BlockName, Record] = {}
        self._heaps: dict[str, list[Record]] = {}  # of each tenant that has candidates
        self._live: dict[str, int] = {}  # candidates of each tenant; no zero entries
        self._firsts: list[Record] = []
        self._over: list[Record] = []
        self._share = 0  # at the last choice
        self._serial = 0

    def add(self, name: BlockName, tenant: str, last_use: float) -> None:
        self._serial += 1
        record = self._candidates[name] = (last_use, self._serial, name, tenant)
        self._live[tenant] = self._live.get(tenant, 0) + 1
        heap = self._heaps.setdefault(tenant, [])
        heapq.heappush(heap, record)
        if heap[0] is record:
            self._push(self._firsts, record)
            self._push(self._over, record)
        if len(heap) > 2 * self._live[tenant] + COMPACT_SLACK:
            heap[:] = [record for record in heap if self._is_live(record)]
            heapq.heapify(heap)

    def remove(self, name: BlockName) -> None:
        tenant = self._candidates.pop(name)[3]
        self._live[tenant] -= 1
        if not self._live[tenant]:
            del self._live[tenant], self._heaps[tenant]

    def grew(self, tenant: str, held: int) -> None:
        if held > self._share and tenant in self._heaps:
            self._push(self._over, self._heaps[tenant][0])

    def victim(self, tenant: str, held: Mapping[str, int], slots: int) -> BlockName | None:
        share = slots // (len(held) + (tenant not in held))
        if share < self._share:
            self._over = [record for record in self._firsts if held.get(record[3], 0) > share]
            heapq.heapify(self._over)
        self._share = share
        within_share = held.get(tenant, 0) < share
        if not within_share and tenant in self._heaps:
            return self._first(tenant)[2]
        name = self._oldest(self._over, held, share)
        return self._oldest(self._firsts, held, 0) if name is None and within_share else name

    def checking(self, candidates: Iterable[BlockName], held: Mapping[str, int]) -> Iterator[None]:
        count = 0
        for names in in_steps(candidates):
            count += len(names)
            if any(name not in self._candidates for name in names):
                raise RuntimeError("a block that may go is unknown to the eviction policy")
            yield
        if count != len(self._candidates):
            raise RuntimeError("eviction candidates are not the committed, unleased, childless blocks")
        live: Counter[str] = Counter()
        for records in in_steps(self._candidates.values()):
            live.update(tenant for _, _, _, tenant in records)
            yield
        if live != self._live or live.keys() != self._heaps.keys():
            raise RuntimeError("eviction counts by tenant are wrong")
        found = 0
        for records in in_steps(chain.from_iterable(self._heaps.values())):
            found += sum(map(self._is_live, records))
            yield
        if found != count:
            raise RuntimeError(f"{found} heap records for {count} eviction candidates")
        for front, more_than in ((self._firsts, 0), (self._over, self._share)):
            oldest: dict[str, Record] = {}
            for records in in_steps(front):
                for record in records:
                    oldest[record[3]] = min(record, oldest.get(record[3], record))
                yield
            for tenants in in_steps(self._heaps):
                for tenant in tenants:
                    first = self._heaps[tenant][0]
                    if held.get(tenant, 0) > more_than and (tenant not in oldest or oldest[tenant] > first):
                        raise RuntimeError("a tenant's oldest block is not known to be its first to go")
                yield

    def _push(self, front: list[Record], record: Record) -> None:
        heapq.heappush(front, record)
        if len(front) > 2 * len(self._heaps) + COMPACT_SLACK:
            front[:] = [self._first(tenant) for tenant in self._heaps]
            heapq.heapify(front)

    def _first(self, tenant: str) -> Record:
        """The oldest candidate of a tenant that has some."""
        heap = self._heaps[tenant]
        while not self._is_live(heap[0]):
            heapq.heappop(heap)
        return heap[0]

    def _oldest(self, front: list[Record], held: Mapping[str, int], more_than: int) -> BlockName | None:
        """The oldest candidate of the tenants that hold more than so many slots, of which `front` has all."""
        while front:
            record = front[0]
            if held.get(record[3], 0) <= more_than or record[3] not in self._heaps:
                heapq.heappop(front)
            elif self._is_live(record):
                return record[2]
            else:
                heapq.heapreplace(front, self._first(record[3]))
        return None

    def _is_live(self, record: Record) -> bool:
        return self._candidates.get(record[2]) is record
