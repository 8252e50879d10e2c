"""Which block goes when a slot is needed: the one replaceable unit of policy.

The index enforces the laws (leased blocks never, tail before head) by telling the policy which blocks may go at all:
committed, unleased, without a committed child. The policy only chooses among those.
"""

import heapq
from collections.abc import Iterable, Mapping
from typing import Protocol

from kvferry.common.hashing import BlockName

COMPACT_SLACK = 64  # stale heap records tolerated beyond one for each candidate


class EvictionPolicy(Protocol):
    """Pure bookkeeping; the index is its only caller and serialises the calls."""

    def add(self, name: BlockName, tenant: str, last_use: float) -> None:
        """`name` may be evicted from now on. It was used last at `last_use` (monotonic seconds)."""
        ...

    def remove(self, name: BlockName) -> None:
        """`name`, a candidate, may no longer be evicted: leased, given a child, or gone."""
        ...

    def victim(self, tenant: str, held: Mapping[str, int], slots: int) -> BlockName | None:
        """The candidate that should make room for a block of `tenant`; it stays a candidate until removed.

        `held` counts the slots of each tenant that has any (committed and being written); `slots` is the arena's
        size. None: nothing may go.
        """
        ...

    def check_integrity(self, candidates: Iterable[BlockName]) -> None:
        """Raise RuntimeError unless exactly `candidates` are known."""
        ...


class FairLru:
    """Least recently used first, each tenant guaranteed `slots // tenants` (the tenants that hold slots now).

    A tenant at or over its share loses its own blocks first, then those of others over theirs, and never takes from
    one within its share. A tenant below its share takes from those over theirs, and if nobody is, from anybody.

    Ties (a prefix is touched as one) go to the block that became a candidate first. Each tenant's candidates are a
    heap with lazy removal: O(log n) a change, O(tenants) a choice.
    """

    def __init__(self) -> None:
        self._candidates: dict[BlockName, tuple[float, int, str]] = {}  # last use, serial number, tenant
        self._heaps: dict[str, list[tuple[float, int, BlockName]]] = {}
        self._live: dict[str, int] = {}  # candidates of each tenant; no zero entries
        self._serial = 0

    def add(self, name: BlockName, tenant: str, last_use: float) -> None:
        self._serial += 1
        self._candidates[name] = (last_use, self._serial, tenant)
        self._live[tenant] = self._live.get(tenant, 0) + 1
        heap = self._heaps.setdefault(tenant, [])
        heapq.heappush(heap, (last_use, self._serial, name))
        if len(heap) > 2 * self._live[tenant] + COMPACT_SLACK:
            heap[:] = [record for record in heap if self._is_live(record)]
            heapq.heapify(heap)

    def remove(self, name: BlockName) -> None:
        _, _, tenant = self._candidates.pop(name)
        self._live[tenant] -= 1
        if not self._live[tenant]:
            del self._live[tenant], self._heaps[tenant]

    def victim(self, tenant: str, held: Mapping[str, int], slots: int) -> BlockName | None:
        share = slots // len(held.keys() | {tenant})
        within_share = held.get(tenant, 0) < share
        if not within_share and tenant in self._live:
            return self._oldest([tenant])
        over = [other for other in self._live if held.get(other, 0) > share]
        if over or not within_share:
            return self._oldest(over)
        return self._oldest(self._live)

    def check_integrity(self, candidates: Iterable[BlockName]) -> None:
        if set(candidates) != self._candidates.keys():
            raise RuntimeError("eviction candidates are not the committed, unleased, childless blocks")
        live: dict[str, int] = {}
        for _, _, tenant in self._candidates.values():
            live[tenant] = live.get(tenant, 0) + 1
        if live != self._live or live.keys() != self._heaps.keys():
            raise RuntimeError("eviction counts by tenant are wrong")
        found = sum(self._is_live(record) for heap in self._heaps.values() for record in heap)
        if found != len(self._candidates):
            raise RuntimeError(f"{found} heap records for {len(self._candidates)} eviction candidates")

    def _oldest(self, tenants: Iterable[str]) -> BlockName | None:
        tops = []
        for tenant in tenants:
            heap = self._heaps[tenant]
            while not self._is_live(heap[0]):
                heapq.heappop(heap)
            tops.append(heap[0])
        return min(tops)[2] if tops else None

    def _is_live(self, record: tuple[float, int, BlockName]) -> bool:
        last_use, serial, name = record
        known = self._candidates.get(name)
        return known is not None and known[:2] == (last_use, serial)
