"""A worker's `BlockStore`: the six verbs over a link to this host's node, which may come and go at any time."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from kvferry.common.block import BlockLayout
from kvferry.common.config import WorkerConfig
from kvferry.common.errors import IncompatibleNode
from kvferry.common.failpoints import Failpoints
from kvferry.common.hashing import Span
from kvferry.common.store_api import Claim, Located, Match, MissReason, Payload, Reservation, StoreStats
from kvferry.kvstore import protocol as say
from kvferry.kvstore.arena import ArenaMap
from kvferry.kvstore.copying import blocks_per_chunk, copy_in, copy_out
from kvferry.kvstore.endings import end, settled
from kvferry.kvstore.link import REPLY_S, Link, Unreachable, beat, post_abort, post_release

log = logging.getLogger(__name__)

RECONNECT_FIRST_S = 0.05
RECONNECT_MOST_S = 1.0
TOUCH_BYTES = 64 * 2**20
SPEED_WEIGHT = 0.2  # of the newest chunk in `pull_bytes_per_s`

BAD_SLOT = "the store names a slot that its arena does not have"
NOT_THERE = Match(miss=MissReason.STORE_UNREACHABLE)
T = TypeVar("T")


@dataclass(slots=True)
class _Held:
    """A lease: the link that gave it, the node's numbers for it, to which blocks that come later add, and what was
    asked for."""

    link: Link
    numbers: list[int]
    span: Span
    tenant: str = ""
    holder: str = ""


class StoreClient:
    """Implements `BlockStore`. Belongs to one event loop.

    `block_bytes` 0 makes an observer: it may look up with `lease=False` and ask for stats. Counters for whoever
    exports them: `pulled_bytes` and `published_bytes` (verified, committed), `bad_blocks` (seen here),
    `pull_bytes_per_s` (moving average of copy and verification; 0 before the first pull), `connects`.
    """

    def __init__(self, socket: Path, block_bytes: int, segments: int, role: str, failpoints: Failpoints | None = None):
        self.pulled_bytes = 0
        self.published_bytes = 0
        self.bad_blocks = 0
        self.pull_bytes_per_s = 0.0
        self.connects = 0
        self._socket = socket
        self._block_bytes = block_bytes
        self._segments = segments
        self._role = role
        self._failpoints = failpoints or Failpoints()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="kvferry-copy")
        self._link: Link | None = None
        self._only_sealed = True
        self._leases: dict[int, _Held] = {}  # by our handle
        self._last_lease = 0
        self._keeper: asyncio.Task | None = None
        self._tell: Callable[[], None] = lambda: None

    @classmethod
    def of_worker(cls, config: WorkerConfig, layout: BlockLayout) -> "StoreClient":
        return cls(config.store, layout.block_bytes, layout.segments, config.role, Failpoints(config.failpoints))

    @property
    def address(self) -> str:
        """By which other hosts' nodes reach the one we are connected to; empty if there is none, or it has none."""
        return self._link.welcome.address if self._link is not None else ""

    @property
    def only_sealed(self) -> bool:
        """Whether the node takes sealed blocks alone, as it said last; so it is taken to be until it has said."""
        return self._only_sealed

    @property
    def connected(self) -> bool:
        return self._link is not None and not self._link.lost.is_set()

    def on_change(self, tell: Callable[[], None]) -> None:
        """Have `tell` called whenever `connected` has changed. One caller at most."""
        self._tell = tell

    async def start(self) -> None:
        """Connect if the node is there, and keep connected from then on. Raises IncompatibleNode if it refuses us."""
        try:
            await self._connect()
        except Unreachable as error:
            log.warning("the store is not there yet, and nothing is found or kept until it is: %s", error)
        self._keeper = asyncio.create_task(self._keep_connected())

    async def close(self) -> None:
        """Give everything back. Copies in flight end first; the arena is unmapped."""
        if self._keeper is not None:
            await end(self._keeper)
        if self._link is not None:
            await self._link.close()
        self._leases.clear()
        await asyncio.to_thread(self._threads.shutdown)

    # -- the six verbs -------------------------------------------------------------------------------------------

    async def lookup(
        self, span: Span, *, tenant: str = "", wait_s: float = 0.0, lease: bool = True, holder: str = ""
    ) -> Match:
        if not len(span):
            return Match()
        wait_s = min(max(wait_s, 0.0), say.MAX_WAIT_S)
        try:
            link = self._current()
            request = say.Lookup(link.next_id(), span.from_(0, say.MAX_NAMES), tenant, holder, wait_s, lease)
            reply = await link.request(
                request, say.Matched, REPLY_S + wait_s, lambda late: post_release(link, late.match.lease)
            )
        except Unreachable:
            return NOT_THERE
        match = reply.match
        if link.arena is not None and not are_slots(link.arena, match.blocks):
            link.drop(BAD_SLOT)
            return NOT_THERE
        if not len(match):
            return match
        held = _Held(link, [match.lease] if match.lease else [], span, tenant, holder)
        return msgspec.structs.replace(match, lease=self._remember(held) if lease else 0)

    async def reserve(self, span: Span, *, tenant: str) -> Reservation:
        try:
            link = self._current()
            request = say.Reserve(link.next_id(), span.from_(0, say.MAX_NAMES), tenant)
            reply = await link.request(
                request, say.Reserved, REPLY_S, lambda late: post_release(link, late.reservation.lease)
            )
        except Unreachable:
            return Reservation((Claim.REFUSED,) * len(span))
        got = reply.reservation
        claims = got.claims + (Claim.REFUSED,) * (len(span) - len(got.claims))
        return Reservation(claims, self._remember(_Held(link, [got.lease], span)) if got.lease else 0, got.boot_id)

    async def publish(self, reservation: Reservation, blocks: Sequence[Payload], seal: bytes | None = None) -> int:
        self._require_block_sizes([block.data for block in blocks])
        if not blocks or (held := self._leases.get(reservation.lease)) is None or not takes(held.link, seal):
            return 0
        try:
            return await self._publish(held.link, held.numbers[0], blocks[: say.MAX_NAMES], seal)
        except Unreachable:
            return 0

    async def pull(self, match: Match, into: Sequence[memoryview], seal: bytes | None = None) -> int:
        self._require_block_sizes(into)
        into = into[: len(match)]
        if (held := self._leases.get(match.lease)) is None or not takes(held.link, seal):
            return 0
        blocks, good = match.blocks, 0
        while good < len(into):
            if not blocks and not (blocks := await self._next(held, good, len(into))):
                break
            copied = await self._copy_out(held, good, blocks[: len(into) - good], into[good:], seal)
            good += copied
            if copied < len(blocks):
                break
            blocks = ()
        return good

    async def _next(self, held: _Held, first: int, end: int) -> tuple[Located, ...]:
        """The blocks of a match from `first` on that have come since; waits for the first of them, unless none is on
        its way any more."""
        link = held.link
        try:
            span = held.span.from_(first, end)
            request = say.Lookup(link.next_id(), span, held.tenant, held.holder, again=True)
            reply = await link.request(request, say.Matched, REPLY_S, lambda late: post_release(link, late.match.lease))
        except Unreachable:
            return ()
        if reply.match.lease:
            held.numbers.append(reply.match.lease)
        if link.arena is None or not are_slots(link.arena, reply.match.blocks):
            link.drop(BAD_SLOT)
            return ()
        return reply.match.blocks

    async def _copy_out(
        self, held: _Held, first: int, blocks: Sequence[Located], into: Sequence[memoryview], seal: bytes | None
    ) -> int:
        """Copy and verify blocks of a match, from its block `first` on; how many leading ones are good."""
        link, span = held.link, held.span.from_(first, first + len(blocks))
        chain = (span.parent, *span.names)
        good = 0
        step = blocks_per_chunk(self._block_bytes)
        for start in range(0, len(blocks), step):
            chunk = blocks[start : start + step]
            if link.lost.is_set() or link.arena is None:
                break
            names, room = chain[start : start + len(chunk) + 1], into[start : start + len(chunk)]
            pulled = await self._in_thread(link, copy_out, link.arena, chunk, names, room, seal, link.lost.is_set)
            self._count_pulled(pulled.good, pulled.seconds)
            good += pulled.good
            if link.lost.is_set():
                break
            if pulled.good < len(chunk):
                bad = chunk[pulled.good]
                self.bad_blocks += 1
                log.warning("a block in slot %d failed verification", bad.slot)
                link.post(say.Quarantine(link.next_id(), names[pulled.good + 1], bad.slot))
                break
        return good

    async def release(self, lease: int) -> bool:
        if (held := self._leases.pop(lease, None)) is None:
            return False
        link, stayed, left = held.link, True, list(held.numbers)
        try:
            while left:
                request = say.Release(link.next_id(), left.pop())
                stayed &= (await link.request(request, say.Released, REPLY_S)).held
        except Unreachable:
            return False
        finally:  # there are some left if we are cancelled
            for number in left:
                post_release(link, number)
        return stayed

    async def erase(self, tenant: str) -> None:
        """Drop all blocks of a tenant (a pseudonym) that this host's node has."""
        try:
            link = self._current()
            await link.request(say.Erase(link.next_id(), tenant), say.Done, REPLY_S)
        except Unreachable as error:
            log.warning("the store cannot be told to drop an erased tenant's blocks: %s", error)

    async def stats(self) -> StoreStats | None:
        try:
            link = self._current()
            return (await link.request(say.Stats(link.next_id()), say.Counted, REPLY_S)).stats
        except Unreachable:
            return None

    # -- publishing ----------------------------------------------------------------------------------------------

    async def _publish(self, link: Link, lease: int, blocks: Sequence[Payload], seal: bytes | None) -> int:
        """Grant, copy, commit. However this ends, the node is told of every slot that we no longer write."""
        names = tuple([block.name for block in blocks])
        request = say.Grant(link.next_id(), lease, names)
        granted = await link.request(request, say.Granted, REPLY_S, lambda late: post_abort(link, late.slots))
        unwritten = {slot for slot in granted.slots if slot is not None}
        there = 0
        try:
            await self._failpoints.hit("publish.granted")
            usable = next((i for i, claim in enumerate(granted.claims) if claim is Claim.REFUSED), len(names))
            step = blocks_per_chunk(self._block_bytes)
            for start in range(0, usable, step):
                end = min(start + step, usable)
                chunk = [(b, s) for b, s in zip(blocks[start:end], granted.slots[start:end], strict=True)
                         if s is not None]  # fmt: skip
                outcomes = await self._copy_and_commit(link, lease, chunk, unwritten, seal)
                if say.CommitOutcome.LATE in outcomes:
                    late = chunk[outcomes.index(say.CommitOutcome.LATE)][0].name
                    return names.index(late, start)
                there = end
            return there
        finally:
            post_abort(link, unwritten)

    async def _copy_and_commit(
        self, link: Link, lease: int, chunk: list[tuple[Payload, int]], unwritten: set[int], seal: bytes | None
    ) -> tuple[say.CommitOutcome, ...]:
        """Fill the slots of a chunk and commit them, which takes them out of `unwritten`."""
        if not chunk:
            return ()
        if link.lost.is_set() or link.arena is None:
            raise Unreachable("the connection is gone")
        slots = [slot for _, slot in chunk]
        payloads = [block for block, _ in chunk]
        told = (link.arena, slots, payloads, self._segments, seal, link.lost.is_set)
        proofs = await self._in_thread(link, copy_in, *told)
        if len(proofs) < len(slots):
            raise Unreachable("the connection went while blocks were copied")
        await self._failpoints.hit("publish.copied")
        written = tuple([say.Written(block.name, block.parent, of.slot, of.salt, of.proofs)
                         for block, of in zip(payloads, proofs, strict=True)])  # fmt: skip
        unwritten.difference_update(slots)  # the commit ends them, whatever it is answered
        reply = await link.request(say.Commit(link.next_id(), lease, written), say.Committed, REPLY_S)
        self.published_bytes += reply.outcomes.count(say.CommitOutcome.COMMITTED) * self._block_bytes
        return reply.outcomes

    # -- copying -------------------------------------------------------------------------------------------------

    async def _in_thread(self, link: Link, work: Callable[..., T], *args: object) -> T:
        """Run a copy in a thread. Cancelled, it returns only once the thread has let go of all memory."""
        with link.arena.in_use():
            job = self._threads.submit(work, *args)
            done = asyncio.wrap_future(job)
            try:
                return await asyncio.shield(done)
            except asyncio.CancelledError:
                if not job.cancel():
                    await settled(done)
                raise

    def _count_pulled(self, blocks: int, seconds: float) -> None:
        size = blocks * self._block_bytes
        self.pulled_bytes += size
        if size and seconds:
            speed = size / seconds
            weight = SPEED_WEIGHT if self.pull_bytes_per_s else 1.0
            self.pull_bytes_per_s += weight * (speed - self.pull_bytes_per_s)

    def _require_block_sizes(self, parts: Sequence[memoryview]) -> None:
        for part in parts:
            if part.nbytes != self._block_bytes or not part.c_contiguous:
                raise ValueError(f"a block has {self._block_bytes} contiguous bytes, not {part.nbytes}")

    # -- the connection ------------------------------------------------------------------------------------------

    def _current(self) -> Link:
        if self._link is None:
            raise Unreachable("not connected")
        return self._link

    def _remember(self, held: _Held) -> int:
        """Our handle for a lease. The node's numbers start anew with each node, ours never."""
        self._last_lease += 1
        if not held.link.lost.is_set():
            self._leases[self._last_lease] = held
        return self._last_lease

    async def _connect(self) -> None:
        self._link = await Link.open(self._socket, self._role, self._block_bytes)
        self._only_sealed = self._link.welcome.sealed
        self.connects += 1
        log.info("connected to the store at %s%s", self._socket, " again" if self.connects > 1 else "")
        self._tell()

    async def _touch(self, link: Link) -> None:
        """Warm the page table for a new arena, a piece at a time, while it is in use already."""
        for start in range(0, link.arena.size if link.arena else 0, TOUCH_BYTES):
            if link.lost.is_set():
                return
            await self._in_thread(link, link.arena.touch, start, TOUCH_BYTES)

    async def _keep_connected(self) -> None:
        delay = RECONNECT_FIRST_S
        told = ""
        while True:
            if self._link is None:
                try:
                    await self._connect()
                except Unreachable as error:
                    log.debug("%s", error)
                except IncompatibleNode as error:
                    if str(error) != told:
                        told = str(error)
                        log.error("the store refuses this worker, which goes on without it: %s", told)
            if self._link is None:
                await asyncio.sleep(delay)
                delay = min(2 * delay, RECONNECT_MOST_S)
                continue
            delay, told = RECONNECT_FIRST_S, ""
            link = self._link
            touching = asyncio.create_task(self._touch(link))
            try:
                await beat(link)
            finally:
                await end(touching)
            await link.close()
            self._link = None
            self._tell()
            self._leases = {ours: held for ours, held in self._leases.items() if held.link is not link}


def takes(link: Link, seal: bytes | None) -> bool:
    """Whether a node has to do with such blocks at all; of plain ones nothing may touch an arena that is for sealed
    ones alone."""
    return seal is not None or not link.welcome.sealed


def are_slots(arena: ArenaMap, blocks: Sequence[Located]) -> bool:
    slots = [block.slot for block in blocks]
    return not slots or (min(slots) >= 0 and max(slots) < arena.slots)
