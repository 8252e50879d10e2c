"""Between page pool and block store: pull a prefix in, publish computed blocks out.

Nothing here can make an answer wrong: what does not arrive, whole and verified, is computed.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from kvferry.common.hashing import BlockName
from kvferry.common.store_api import BlockStore, Claim, Match, MissReason, Payload, Reservation
from kvferry.engine.kv_memory import KvMemory
from kvferry.engine.page_pool import PagePool
from kvferry.engine.sequence import Sequence, Status

log = logging.getLogger(__name__)

# A hole is one block that is gone or bad while later ones may still be there. More than a few are not worth asking for.
MAX_HOLES = 8
HOLE_REASONS = (MissReason.EVICTED, MissReason.BEING_WRITTEN)
SINGLE_FLIGHT_WAITS = 2


class Transfer:
    """Moves blocks for one engine. Shares its event loop, its pool and its memory."""

    def __init__(self, pool: PagePool, memory: KvMemory, store: BlockStore, single_flight_wait_s: float):
        self._pool = pool
        self._memory = memory
        self.store = store
        self.single_flight_wait_s = single_flight_wait_s
        self._releases: set[asyncio.Task[bool]] = set()

    async def pull(self, seq: Sequence, upto: int) -> int:
        """Bring blocks below index `upto`, as far as they may be reused, into a restoring sequence's table.

        Returns how many came. A block that is missing or bad is left out and later ones are still tried.
        """
        admission, pulled, holes = seq.admissions, 0, 0
        index, upto = seq.blocks_computed, min(upto, seq.reuse_cap)
        while index < upto and holes <= MAX_HOLES and seq.admissions == admission and seq.status is Status.RESTORING:
            if index in seq.filled:
                index += 1
                continue
            end = next((i for i in range(index, upto) if i in seq.filled), upto)
            match = await self.store.lookup(seq.names[index:end])
            good = await self._copy_in(seq, admission, match, index)
            pulled += good
            index += good
            if index < end:
                if good == len(match.blocks) and match.miss not in HOLE_REASONS:
                    break
                index, holes = index + 1, holes + 1
        return pulled

    async def _copy_in(self, seq: Sequence, admission: int, match: Match, first: int) -> int:
        """Copy a match into the table from index `first`; how many of its blocks are good and still wanted."""

        def wanted() -> bool:
            return seq.admissions == admission and seq.status is Status.RESTORING

        if not match.lease:
            return 0
        blocks = seq.block_table[first : first + len(match.blocks)] if wanted() else []
        self._pool.hold(blocks)
        good, landing = 0, self._memory.landing(blocks)
        try:
            if blocks:
                good = await self.store.pull(match, landing)
        except asyncio.CancelledError:
            self._release_later(match.lease)
            raise
        finally:
            self._pool.release(blocks)
        held = await self.store.release(match.lease)
        if not (held and wanted()):
            return 0
        self._memory.land(blocks[:good], landing[:good])
        for index in range(first, first + good):
            self._pool.name(seq.block_table[index], seq.names[index])
            seq.fill(index)
        return good

    def _release_later(self, lease: int) -> None:
        """Give a lease back without waiting: who is cancelled must end at once, even when the store hangs."""
        task = asyncio.create_task(self.store.release(lease))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def offer(self, seq: Sequence, blocks: list[int], first: int) -> None:
        """Publish computed blocks, `blocks[i]` for `seq.names[first + i]`, unless somebody else has or does. The
        caller holds the blocks."""
        names = seq.names[first : first + len(blocks)]
        reservation = await self.store.reserve(names, parent=parent_of(seq, first), tenant=seq.scope.keys.pseudonym)
        try:
            granted = [i for i, claim in enumerate(reservation.claims) if claim is Claim.GRANTED]
            await self.publish(seq, reservation, [(first + i, blocks[i]) for i in granted])
        finally:
            if reservation.lease:
                await self.store.release(reservation.lease)

    async def publish(self, seq: Sequence, reservation: Reservation, blocks: list[tuple[int, int]]) -> int:
        """Publish `(index in the sequence, pool block)` pairs that `reservation` granted; how many leading ones are
        in the store now."""
        if not blocks:
            return 0
        payloads = [Payload(seq.names[i], parent_of(seq, i), self._memory.host_view(block)) for i, block in blocks]
        return await self.store.publish(reservation, payloads)

    def background(self, seq: Sequence, publish: "Publish", start: int) -> "BackgroundPublisher":
        return BackgroundPublisher(self._pool, seq, publish, start)


def parent_of(seq: Sequence, index: int) -> BlockName:
    return seq.names[index - 1] if index else seq.scope.root()


class FillHolding:
    """What a fill holds in the store: leases on the blocks that were there, reservations of those it will compute.

    While it is open, every block below `committed` stays. `open` waits, holding nothing, while somebody else computes
    the first block that is missing, twice at the most.
    """

    def __init__(self, transfer: Transfer, seq: Sequence):
        self._transfer, self._seq = transfer, seq
        self._match = Match()
        self._reservation = Reservation((), ())
        self._claims: dict[int, Claim] = {}  # by the index of the block
        self._there: set[int] = set()
        self.committed = 0  # leading blocks of the sequence that are in the store, leased by us
        self.found = 0  # how many of them were there before us

    async def open(self) -> None:
        seq, store = self._seq, self._transfer.store
        for waits_left in range(SINGLE_FLIGHT_WAITS, -1, -1):
            self._match = await store.lookup(seq.names)
            found = len(self._match.blocks)
            if missing := seq.names[found:]:
                self._reservation = await store.reserve(
                    missing, parent=parent_of(seq, found), tenant=seq.scope.keys.pseudonym
                )
            taken = self._reservation.claims[:1] == (Claim.TAKEN,)
            if not taken or not waits_left:
                break
            await self.close()
            await store.lookup(seq.names, wait_s=self._transfer.single_flight_wait_s, lease=False)
        self._claims = dict(enumerate(self._reservation.claims, start=found))
        self._there = {*range(found), *(i for i, claim in self._claims.items() if claim is Claim.PRESENT)}
        self._count()
        self.found = self.committed

    async def publish(self, blocks: list[int], first: int) -> None:
        """Publish those of the computed blocks that are ours to publish. The caller holds the blocks."""
        ours = [
            (index, block)
            for index, block in enumerate(blocks, start=first)
            if self._claims.get(index) is Claim.GRANTED
        ]
        done = await self._transfer.publish(self._seq, self._reservation, ours)
        self._there.update(index for index, _ in ours[:done])
        self._count()

    def _count(self) -> None:
        while self.committed in self._there:
            self.committed += 1

    async def close(self) -> None:
        """Give everything back. May be repeated."""
        leases = [lease for lease in (self._match.lease, self._reservation.lease) if lease]
        self._match, self._reservation = Match(), Reservation((), ())
        for lease in leases:
            await self._transfer.store.release(lease)


Publish = Callable[[list[int], int], Awaitable[None]]  # pool blocks, and the sequence's index of the first


class BackgroundPublisher:
    """Publishes a sequence's blocks beside the steps that compute the next ones, in chain order.

    It holds each block from the moment it is computed until it is published, so the sequence may end or be preempted
    meanwhile.
    """

    def __init__(self, pool: PagePool, seq: Sequence, publish: Publish, start: int):
        self._pool, self._seq, self._publish = pool, seq, publish
        self._next = start
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
        while batch := self._queued[:]:
            try:
                await self._publish(batch, self._next)
            except Exception:  # the answer does not depend on it
                log.exception("publishing for request %s failed", self._seq.request_id)
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
            await asyncio.gather(self._task, return_exceptions=True)
        self._pool.release(self._queued)
        self._queued = []
