"""Bringing blocks here from other nodes, straight from the socket into slots of this arena.

The blocks that come are reserved like those that somebody computes, so that nobody computes or brings them twice, and
land a few megabytes at a time (landing.py). Spread over those who have them; what one does not deliver in time, the
next is asked for.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvferry.common.errors import IncompatibleNode
from kvferry.common.hashing import Span
from kvferry.common.store_api import Claim
from kvferry.kvstore.arena import ArenaMap
from kvferry.kvstore.index import Index
from kvferry.kvstore.landing import Coming, Landing
from kvferry.kvstore.link import Unreachable
from kvferry.kvstore.peering import MAX_FETCH
from kvferry.kvstore.peers import FETCHES_MOST, PATIENCE_S, Inflow, Peers, Slow
from kvferry.kvstore.protocol import ProtocolError

log = logging.getLogger(__name__)

STRIPE_BYTES = 32 * 2**20  # a connection takes so much at a time where there are several
LEAST_BYTES_PER_S = 50e6  # that come here, all connections together; below that computing is quicker
THREADS = 4 * FETCHES_MOST
FAILED = (Slow, ProtocolError, IncompatibleNode, EOFError, OSError)

Sources = Sequence[Sequence[str]]  # for each name, the addresses that may have it


class Fetcher:
    """Brings blocks. Owns a connection of the index, which its node renews by `renew`."""

    def __init__(self, index: Index, changed: Callable[[], None], peers: Peers, connections: int, only_sealed: bool):
        self._index = index
        self._changed = changed
        self._peers = peers
        self._connections = connections
        self._only_sealed = only_sealed
        self._arena: ArenaMap | None = None
        self._connection = index.connect(bringing=True)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvferry-fetch")
        self._running: set[asyncio.Task[None]] = set()
        self._inflows: set[Inflow] = set()

    def use(self, arena: ArenaMap) -> None:
        """The arena is divided."""
        self._arena = arena

    def renew(self) -> None:
        self._index.renew(self._connection)

    def begin(self, span: Span, tenant: str, sources: Sources) -> None:
        """Bring what can be had of the leading names, for which there are sources. From now on they are known to be on
        their way, until they are there or nobody delivers them."""
        if self._arena is None or not sources:
            return
        span = span.from_(0, min(len(sources), MAX_FETCH))
        reservation = self._index.reserve(self._connection, span, tenant=tenant)
        wanted = [i for i, claim in enumerate(reservation.claims) if claim is Claim.GRANTED]
        task = asyncio.create_task(self._bring(span, wanted, reservation.lease, sources))
        self._running.add(task)
        task.add_done_callback(self._ended)

    async def close(self) -> None:
        """End what is under way; no thread touches the arena afterwards."""
        for inflow in self._inflows:
            inflow.interrupt()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("bringing blocks failed", exc_info=error)

    async def _bring(self, span: Span, wanted: list[int], lease: int, sources: Sources) -> None:
        size = len(wanted) * self._arena.block_bytes
        deadline = time.monotonic() + PATIENCE_S + size / LEAST_BYTES_PER_S  # then nobody else is asked any more
        failed: set[str] = set()
        try:
            while wanted and time.monotonic() < deadline:
                lanes = self._lanes(wanted, sources, failed)
                if not lanes:
                    break
                lacking = await asyncio.gather(*(self._lane(span, part, lease, address) for address, part in lanes))
                failed |= {address for (address, _), lack in zip(lanes, lacking, strict=True) if lack}
                # What had no room here is not ours any more: the next holder would send it in vain.
                wanted = sorted(i for lack in lacking for i in lack if self._index.is_pending(span.names[i]))
            self._index.withdraw(self._connection, lease, [span.names[i] for i in wanted])
        finally:
            self._index.release(self._connection, lease)
            self._changed()

    def _lanes(self, wanted: list[int], sources: Sources, failed: set[str]) -> list[tuple[str, list[int]]]:
        """Who is asked for which blocks: stripes in turn over the connections, up to the first that nobody has."""
        possible = [[a for a in sources[i] if a not in failed and self._peers.usable(a)] for i in wanted]
        end = next((n for n, addresses in enumerate(possible) if not addresses), len(wanted))
        wanted, possible = wanted[:end], possible[:end]
        if not wanted:
            return []
        stripe = max(1, STRIPE_BYTES // self._arena.block_bytes)
        addresses = list(dict.fromkeys(a for some in possible for a in some))
        lanes = [(a, []) for _ in range(min(self._connections, -(-len(wanted) // stripe))) for a in addresses]
        if len(addresses) == 1 and len(lanes) == 1:
            return [(addresses[0], wanted)]
        for number, start in enumerate(range(0, len(wanted), stripe)):
            part = slice(start, start + stripe)
            able = [parts for a, parts in lanes if all(a in some for some in possible[part])] or [
                parts for a, parts in lanes if a in possible[start]
            ]
            able[number % len(able)].extend(wanted[part])
        return [(a, parts) for a, parts in lanes if parts]

    async def _lane(self, span: Span, part: list[int], lease: int, address: str) -> list[int]:
        """Fetch by one connection, when it is our turn there; what did not come."""
        async with self._peers.turn(address):
            return await self._fetch(span, part, lease, address)

    async def _fetch(self, span: Span, part: list[int], lease: int, address: str) -> list[int]:
        for fresh in (False, True):
            if not part:
                break
            try:
                inflow = await self._peers.inflow(address, fresh)
            except Unreachable as error:
                log.debug("%s", error)
                return part
            self._inflows.add(inflow)
            try:
                came, whole = await self._receive(inflow, span, part, lease)
            except FAILED as error:
                inflow.close()
                if inflow.used and not fresh:  # it was kept too long: the peer has been started anew, or let it go
                    part = [i for i in part if not self._index.is_there(span.names[i])]
                    continue
                self._peers.failed(address, error)
                return [i for i in part if not self._index.is_there(span.names[i])]
            except BaseException:
                inflow.close()
                raise
            finally:
                self._inflows.discard(inflow)
            if whole:
                self._peers.give_back(inflow, address)
            else:
                inflow.close()
            return part[came:]
        return part

    async def _receive(self, inflow: Inflow, span: Span, part: list[int], lease: int) -> tuple[int, bool]:
        """How many of the blocks came, and whether that was all that was sent. Raises one of FAILED."""
        names = [span.names[i] for i in part]
        sent = await inflow.request(names, self._arena.block_bytes)
        if self._only_sealed and not all(block.salt for block in sent):
            raise ProtocolError("it sends plain blocks, and this store takes only sealed ones")
        if not sent:
            return 0, True
        await inflow.begun()
        parents = [span.names[i - 1] if i else span.parent for i in part]
        coming = list(map(Coming, names, parents, sent))
        landing = Landing(self._index, self._connection, lease, self._arena, coming, self._changed)
        await landing.run(inflow, self._threads, self._least)
        return landing.landed, landing.landed == len(sent)

    def _least(self) -> float:
        """Bytes a second that one connection should bring. Threads may ask."""
        return LEAST_BYTES_PER_S / max(1, len(self._inflows))
