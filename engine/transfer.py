"""Between page pool and block store: pull a prefix in, publish computed blocks out.

Nothing here can make an answer wrong: what does not arrive, whole and verified, is computed.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import groupby

from kvferry.common.hashing import BlockName
from kvferry.common.store_api import BlockStore, Claim, Match, MissReason, Payload, Reservation
from kvferry.common.telemetry import REQUEST_ID
from kvferry.engine.kv_memory import KvMemory
from kvferry.engine.page_pool import PagePool
from kvferry.engine.sequence import Sequence, Status

log = logging.getLogger(__name__)

# A hole is one block that is gone or bad while later ones may still be there. More than a few are not worth asking for.
MAX_HOLES = 8
HOLE_REASONS = (MissReason.EVICTED, MissReason.BEING_WRITTEN, MissReason.PAYLOAD_BAD)
SINGLE_FLIGHT_WAITS = 2


class Transfer:
    """Moves blocks for one engine. Shares its event loop, its pool and its memory."""

    def __init__(self, pool: PagePool, memory: KvMemory, store: BlockStore, single_flight_wait_s: float):
        self._pool = pool
        self._memory = memory
        self.store = store
        self.single_flight_wait_s = single_flight_wait_s
        self._releases: set[asyncio.Task[bool]] = set()

    async def pull(self, seq: Sequence, upto: int, holder: str = "") -> int:
        """Bring blocks below index `upto`, as far as they may be reused, into a restoring sequence's table. `holder`:
        the store node that should have them.

        Returns how many came. A block that is missing or bad is left out and later ones are still tried.
        """
        admission, pulled, holes = seq.admissions, 0, 0
        index, upto = seq.blocks_computed, min(upto, seq.reuse_cap)
        while index < upto and holes <= MAX_HOLES and still_restoring(seq, admission):
            if index in seq.filled:
                index += 1
                continue
            end = next((i for i in range(index, upto) if i in seq.filled), upto)
            match = await self.store.lookup(seq.span(index, end), tenant=seq.tenant, holder=holder)
            good = await self._copy_in(seq, admission, match, index)
            pulled += good
            index += good
            if index < end:
                if good == len(match) and match.miss not in HOLE_REASONS:
                    break
                index, holes = index + 1, holes + 1
        return pulled

    async def _copy_in(self, seq: Sequence, admission: int, match: Match, first: int) -> int:
        """Copy a match into the table from index `first`; how many of its blocks are good and still wanted."""
        if not match.lease:
            return 0
        blocks = seq.block_table[first : first + len(match)] if still_restoring(seq, admission) else []
        self._pool.hold(blocks)
        good, landing = 0, self._memory.landing(blocks)
        try:
            if blocks:
                good = await self.store.pull(match, landing, seq.seal)
        except asyncio.CancelledError:
            self.release_later(match.lease)
            raise
        finally:
            self._pool.release(blocks)
        held = await self.store.release(match.lease)
        if not (held and still_restoring(seq, admission)):
            return 0
        self._memory.land(blocks[:good], landing[:good])
        for index in range(first, first + good):
            self._pool.name(seq.block_table[index], seq.names[index], seq.tenant)
            seq.fill(index)
        return good

    def release_later(self, lease: int) -> asyncio.Task[bool]:
        """Give a lease back without waiting: who is cancelled must end at once, even when the store hangs."""
        task = asyncio.create_task(self.store.release(lease))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)
        return task

    async def offer(self, seq: Sequence, blocks: list[int], first: int) -> None:
        """Publish computed blocks, `blocks[i]` for `seq.names[first + i]`, unless somebody else has or does. The
        caller holds the blocks."""
        reservation = await self.store.reserve(seq.span(first, first + len(blocks)), tenant=seq.tenant)
        try:
            granted = [i for i, claim in enumerate(reservation.claims) if claim is Claim.GRANTED]
            await self.publish(seq, reservation, [(first + i, blocks[i]) for i in granted])
        finally:
            if reservation.lease:
                self.release_later(reservation.lease)

    async def publish(self, seq: Sequence, reservation: Reservation, blocks: list[tuple[int, int]]) -> int:
        """Publish `(index in the sequence, pool block)` pairs that `reservation` granted; how many leading ones are
        in the store now."""
        if not blocks:
            return 0
        payloads = [Payload(seq.names[i], parent_of(seq, i), self._memory.host_view(block)) for i, block in blocks]
        return await self.store.publish(reservation, payloads, seq.seal)

    def background(self, seq: Sequence, publish: "Publish", first: int = 0) -> "BackgroundPublisher":
        return BackgroundPublisher(self._pool, seq, publish, first)


def still_restoring(seq: Sequence, admission: int) -> bool:
    """Whether a sequence has not been pushed out since its `admission`-th admission."""
    return seq.admissions == admission and seq.status is Status.RESTORING


def parent_of(seq: Sequence, index: int) -> BlockName:
    return seq.names[index - 1] if index else seq.scope.root()


class FillHolding:
    """What a fill holds in the store: leases on the blocks that were there, reservations of those it will compute.

    While it is open, and the store lives, every block below `committed` stays, unless it is found to be bad. `open`
    waits, holding nothing, while somebody else computes the first block that is missing, twice at the most.
    """

    def __init__(self, transfer: Transfer, seq: Sequence):
        self._transfer, self._seq = transfer, seq
        self._leases: list[int] = []
        self._granted: dict[int, Reservation] = {}  # by the index of the block
        self._there: set[int] = set()

    @property
    def committed(self) -> int:
        """Leading blocks of the sequence that are in the store, leased by us."""
        return next(i for i in range(len(self._there) + 1) if i not in self._there)

    async def open(self) -> None:
        seq, store = self._seq, self._transfer.store
        for waits_left in range(SINGLE_FLIGHT_WAITS, -1, -1):
            span = seq.span(0, len(seq.names))
            match = await store.lookup(span, tenant=seq.tenant)
            self._keep(match.lease)
            self._there = set(range(len(match.blocks)))
            taken = await self._reserve(len(match.blocks), len(seq.names)) is Claim.TAKEN
            if not taken or not waits_left:
                break
            if releases := self.close():
                await asyncio.wait(releases)
            await store.lookup(span, tenant=seq.tenant, wait_s=self._transfer.single_flight_wait_s, lease=False)

    async def _reserve(self, first: int, end: int) -> Claim | None:
        """Claim blocks `first .. end - 1`; what the first of them got."""
        if first == end:
            return None
        seq = self._seq
        reservation = await self._transfer.store.reserve(seq.span(first, end), tenant=seq.tenant)
        self._keep(reservation.lease)
        for index, claim in enumerate(reservation.claims, start=first):
            if claim is Claim.PRESENT:
                self._there.add(index)
            elif claim is Claim.GRANTED:
                self._granted[index] = reservation
        return reservation.claims[0]

    async def replace_missing(self) -> None:
        """After a pull: blocks that turned out to be bad or gone are claimed, so that they are published anew."""
        seq = self._seq
        for index in range(seq.blocks_computed, seq.reuse_cap):
            if index in self._there and index not in seq.filled:
                self._there.discard(index)
                await self._reserve(index, index + 1)

    async def publish(self, blocks: list[int], first: int) -> int:
        """Publish those of the computed blocks that are ours to publish; how many were. The caller holds the blocks."""
        ours = [(i, block) for i, block in enumerate(blocks, start=first) if i in self._granted]
        published = 0
        for _, some in groupby(ours, key=lambda pair: self._granted[pair[0]].lease):
            pairs = list(some)
            done = await self._transfer.publish(self._seq, self._granted[pairs[0][0]], pairs)
            self._there.update(index for index, _ in pairs[:done])
            published += done
        return published

    def _keep(self, lease: int) -> None:
        if lease:
            self._leases.append(lease)

    def close(self) -> list[asyncio.Task[bool]]:
        """Give everything back, without waiting; the tasks that tell the store. May be repeated."""
        leases, self._leases = self._leases, []
        self._granted = {}
        self._there = set()
        return [self._transfer.release_later(lease) for lease in leases]


Publish = Callable[[list[int], int], Awaitable[None]]  # pool blocks, and the sequence's index of the first


class BackgroundPublisher:
    """Publishes a sequence's blocks, from index `first` on, beside the steps that compute the next ones, in chain
    order.

    It holds each block from the moment it is computed until it is published, so the sequence may end or be preempted
    meanwhile.
    """

    def __init__(self, pool: PagePool, seq: Sequence, publish: Publish, first: int):
        self._pool, self._seq, self._publish = pool, seq, publish
        self._next = first
        self._queued: list[int] = []
        self._task: asyncio.Task[None] | None = None

    def advance(self) -> None:
        """Take over the blocks that the sequence has computed since the last call."""
        upto = self._seq.blocks_computed
        if upto <= self._next + len(self._queued):
            return
        fresh = self._seq.block_table[self._next + len(self._queued) : upto]
        self._pool.hold(fresh)
        self._queued += fresh
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        REQUEST_ID.set(self._seq.request_id)  # the engine's own task starts this one
        while batch := self._queued[:]:
            try:
                await self._publish(batch, self._next)
            except Exception:  # the answer does not depend on it
                log.exception("publishing failed")
            self._pool.release(batch)
            self._next += len(batch)
            del self._queued[: len(batch)]

    async def drain(self) -> None:
        """Wait until everything taken over is published."""
        if self._task is not None:
            await self._task

    async def close(self) -> None:
        """Stop, and let go of what is not published. May be repeated."""
        if self._task is not None:
            self._task.cancel()
        try:
            if self._task is not None:
                await asyncio.wait([self._task])
        finally:
            self._pool.release(self._queued)
            self._queued = []
