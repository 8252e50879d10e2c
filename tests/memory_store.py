"""A `BlockStore` in a dictionary, with faults that a test switches on. Not a model of the node's memory: it never
evicts by itself and its leases lapse only when told to."""

import asyncio
from collections import Counter
from collections.abc import Sequence

from kvferry.common.hashing import BlockName, Span
from kvferry.common.store_api import Claim, Located, Match, MissReason, Payload, Reservation, StoreStats


class MemoryStore:
    """Implements `BlockStore`.

    Faults: `evict` a name; `bad` names fail verification and are quarantined; while `torn` is set, pulls give rubbish
    and their release says False; `publishing`, `pulling` and `releasing`, while cleared, hold up those calls.
    """

    address = ""

    def __init__(self) -> None:
        self.blocks: dict[BlockName, bytes] = {}
        self.parents: dict[BlockName, BlockName] = {}
        self.owners: dict[BlockName, int] = {}  # reserved name -> lease
        self.leases: dict[int, set[BlockName]] = {}
        self.asked: dict[int, Span] = {}  # by lease
        self.evicted: set[BlockName] = set()
        self.bad: set[BlockName] = set()
        self.quarantined: set[BlockName] = set()
        self.torn = False
        self.publishing, self.releasing = asyncio.Event(), asyncio.Event()
        self.pulling = asyncio.Event()
        self.publishing.set()
        self.pulling.set()
        self.releasing.set()
        self.calls: Counter[str] = Counter()
        self.waiters = 0
        self._moved = asyncio.Condition()
        self._last_lease = 0

    def _lease(self, names: set[BlockName]) -> int:
        self._last_lease += 1
        self.leases[self._last_lease] = names
        return self._last_lease

    def evict(self, name: BlockName) -> None:
        del self.blocks[name]
        self.evicted.add(name)

    async def lookup(
        self, span: Span, *, tenant: str = "", wait_s: float = 0.0, lease: bool = True, holder: str = ""
    ) -> Match:
        self.calls["lookup"] += 1
        names = span.names

        def found() -> list[BlockName]:
            return list(names[: next((i for i, name in enumerate(names) if name not in self.blocks), len(names))])

        if wait_s:
            self.waiters += 1
            async with self._moved:
                await self._moved.wait_for(
                    lambda: len(found()) == len(names) or names[len(found())] not in self.owners,
                )
            self.waiters -= 1
        there = found()
        reason = None
        if len(there) < len(names):
            absent = names[len(there)]
            reason = MissReason.EVICTED if absent in self.evicted else MissReason.NEVER_STORED
            reason = MissReason.PAYLOAD_BAD if absent in self.quarantined else reason
            reason = MissReason.BEING_WRITTEN if absent in self.owners else reason
        handle = self._lease(set(there)) if lease and there else 0
        self.asked[handle] = span
        return Match((Located(0, b"", b""),) * len(there), 0, handle, b"boot", reason)

    async def reserve(self, span: Span, *, tenant: str) -> Reservation:
        self.calls["reserve"] += 1
        claims = []
        lease = self._lease(set())
        for name in span.names:
            if name in self.blocks:
                claims.append(Claim.PRESENT)
                self.leases[lease].add(name)
            elif name in self.owners:
                claims.append(Claim.TAKEN)
            else:
                claims.append(Claim.GRANTED)
                self.owners[name] = lease
        if set(claims) <= {Claim.TAKEN}:
            del self.leases[lease]
            lease = 0
        return Reservation(tuple(claims), lease, b"boot")

    async def publish(self, reservation: Reservation, blocks: Sequence[Payload], seal: bytes | None = None) -> int:
        self.calls["publish"] += 1
        await self.publishing.wait()
        for done, block in enumerate(blocks):
            if self.owners.get(block.name) != reservation.lease:
                return done
            self.blocks[block.name] = bytes(block.data)
            self.quarantined.discard(block.name)
            self.parents[block.name] = block.parent
            self.leases[reservation.lease].add(block.name)
            del self.owners[block.name]
            await self._notify()
        return len(blocks)

    async def pull(self, match: Match, into: Sequence[memoryview], seal: bytes | None = None) -> int:
        self.calls["pull"] += 1
        await self.pulling.wait()
        for good, (name, target) in enumerate(zip(self.asked[match.lease].names, into, strict=False)):
            if name in self.bad:
                target[:] = b"\x7f" * len(target)
                self.evict(name)
                self.bad.discard(name)
                self.quarantined.add(name)
                return good
            target[:] = b"\x7f" * len(target) if self.torn else self.blocks[name]
        return len(into)

    async def release(self, lease: int) -> bool:
        self.calls["release"] += 1
        await self.releasing.wait()
        if self.leases.pop(lease, None) is None:
            return False
        for name in [name for name, owner in self.owners.items() if owner == lease]:
            del self.owners[name]
        await self._notify()
        return not self.torn

    async def _notify(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    async def stats(self) -> StoreStats:
        return StoreStats(committed=len(self.blocks), reserved=len(self.owners), leases=len(self.leases))

    def check_nothing_held(self) -> None:
        """Raises AssertionError when a lease or a reservation is still open."""
        if self.leases or self.owners or self.waiters:
            raise AssertionError(f"{len(self.leases)} leases, {len(self.owners)} reservations, {self.waiters} waiters")
