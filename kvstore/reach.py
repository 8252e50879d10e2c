"""What a node does beyond its own arena: it finds out who else has blocks and has them brought here, says what it has,
and sees to it that no two hosts compute the same prefix at once."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Sequence

import msgspec

from kvferry.common.clock import Clock
from kvferry.common.hashing import SEGMENT, BlockName, Span
from kvferry.common.store_api import Claim, Match, MissReason, StoreStats
from kvferry.kvstore import protocol as say
from kvferry.kvstore.directory import CLAIM_S, Directory, Holder, Key
from kvferry.kvstore.fetching import Fetcher
from kvferry.kvstore.index import Index
from kvferry.kvstore.link import Unreachable
from kvferry.kvstore.peers import Peers

log = logging.getLogger(__name__)

ASK_S = 1.0  # for an answer that needs no waiting
WAIT_S = 1.0  # for one that waits
AGAIN_S = 0.1  # until one is asked again that did not wait
LOCATE_S = 0.05  # after so long nothing more is asked of the directory about a span
AT_ONCE = 16 * SEGMENT  # names
RENEW_S = 0.7  # claims last two seconds
MAX_ELSEWHERE = 4096
MAX_OWNERS = 2  # that are asked whether they compute: the first, and who was quicker to take over


class Reach:
    """Belongs to the event loop, like the index. `bring` and `seen` take twice the directory's budget at most, `claim`
    as long as it takes to hear from each owner that is asked, or to give it up."""

    def __init__(self, index: Index, directory: Directory, peers: Peers, fetcher: Fetcher, clock: Clock):
        self._index, self._directory, self._peers, self._fetcher = index, directory, peers, fetcher
        self._clock = clock
        # Who was seen to compute the fill that begins there, and until when that is believed.
        self._elsewhere: OrderedDict[BlockName, tuple[Holder, float]] = OrderedDict()
        self._fills: dict[BlockName, Span] = {}  # ours, each from the block on that is claimed
        self._renewed = clock.now()
        self._background: set[asyncio.Task[None]] = set()

    def with_others(self, stats: StoreStats) -> StoreStats:
        """A node's numbers, with what it is connected to."""
        return msgspec.structs.replace(stats, directory=self._directory.state, peers_away=self._peers.away)

    async def bring(self, span: Span, tenant: str, holder: str) -> None:
        """Have the span, whose first block is not here, begin to come, as far as anybody has it."""
        if not self._index.is_known(span.names[0]):
            self._fetcher.begin(span, tenant, await self._sources(span, holder))

    async def seen(self, span: Span) -> int:
        """How many leading blocks of the span, which are not here, others seem to have."""
        return len(await self._located(span))

    async def wait(self, span: Span, deadline: float) -> None:
        """While another host computes the first block of the span, wait there, until it is done or `deadline` (the
        loop's time)."""
        name = span.names[0]
        owner = self._owner_of(name)
        if owner is None:
            return
        now = asyncio.get_running_loop().time
        # A piece at a time: a host that is gone without a word is found out.
        while (left := deadline - now()) > 0:
            end = now() + min(left, WAIT_S)
            match = await self._ask(owner, span, min(left, WAIT_S))
            if match is None or not (match.blocks or match.miss is MissReason.BEING_WRITTEN):
                self._elsewhere.pop(name, None)
                return
            self._saw(name, owner)
            if match.miss is not MissReason.BEING_WRITTEN:
                return
            await asyncio.sleep(min(AGAIN_S, max(0.0, end - now())))

    async def claim(self, span: Span, claims: Sequence[Claim]) -> int | None:
        """Of a reservation that this node has given: the index from which on another host computes already; None if
        nobody does."""
        first = next((i for i, claim in enumerate(claims) if claim is Claim.GRANTED), None)
        if first is None:
            return None
        name, key = span.names[first], first_key(span.from_(first))
        owner = None
        for _ in range(MAX_OWNERS):
            owner = await self._directory.claim(key, instead_of=owner)
            if owner is None:
                self._elsewhere.pop(name, None)
                self._fills[name] = span.from_(first)
                return None
            if await self._is_computing(owner, span.from_(first, first + 1)):
                self._saw(name, owner)
                return first
        return None  # several may compute, and the first writer wins

    def used(self, span: Span, count: int) -> None:
        """The leading blocks of a span were found here."""
        if count:
            self._later(self._directory.announce(keys_of(span.from_(0, count))))

    def announce(self, keys: Sequence[Key]) -> None:
        """Say, without waiting, which blocks came to be here; and before that claim what their fills compute next, for
        who finds these will look for that."""
        claims = self._carry_on()
        if claims or keys:
            self._later(self._tell(claims, keys))

    def tick(self) -> None:
        """Keep the claims of what is being computed here. Call a few times a second."""
        self.announce(())
        if self._clock.now() - self._renewed < RENEW_S:
            return
        self._renewed = self._clock.now()
        if self._fills:
            self._later(self._directory.renew([first_key(rest) for rest in self._fills.values()]))

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def _carry_on(self) -> list[Key]:
        """Have each fill go on to the first block that is still being computed here. What is to be claimed for that."""
        fills, claims = {}, []
        for rest in self._fills.values():
            at = next((i for i, name in enumerate(rest.names) if self._index.is_pending(name)), None)
            if at is None:
                continue
            if at:
                rest = rest.from_(at)
                claims.append(first_key(rest))
            fills[rest.names[0]] = rest
        self._fills = fills
        return claims

    async def _tell(self, claims: Sequence[Key], keys: Sequence[Key]) -> None:
        """What another host has claimed before is computed by both, and the first writer wins."""
        await asyncio.gather(*map(self._directory.claim, claims))
        await self._directory.announce(keys)

    def _later(self, doing: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(doing)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("telling the directory failed", exc_info=error)

    def _saw(self, name: BlockName, owner: Holder) -> None:
        """It computes the fill that begins there, or has just done so."""
        self._elsewhere[name] = owner, self._clock.now() + CLAIM_S
        self._elsewhere.move_to_end(name)
        if len(self._elsewhere) > MAX_ELSEWHERE:
            self._elsewhere.popitem(last=False)

    def _owner_of(self, name: BlockName) -> Holder | None:
        owner, until = self._elsewhere.get(name, (None, 0.0))
        return owner if self._clock.now() < until else None

    async def _sources(self, span: Span, holder: str) -> list[list[str]]:
        """For the leading names that somebody else should have: where. A named holder should have all of them."""
        known = [holder] if holder and holder != self._peers.me.address else []
        if (owner := self._owner_of(span.names[0])) is not None:
            known.append(owner.address)
        located = await self._located(span)
        if not known:
            return located
        located += [[]] * (len(span) - len(located))
        return [[*known, *(address for address in one if address not in known)] for one in located]

    async def _located(self, span: Span) -> list[list[str]]:
        """What the directory says of the leading names, as many as there is time for."""
        sources: list[list[str]] = []
        until = self._clock.now() + LOCATE_S
        at_once = SEGMENT  # most prefixes that nobody has show in their first segment
        while len(sources) < len(span) and (not sources or self._clock.now() < until):
            part = span.from_(len(sources), len(sources) + at_once)
            for holders in await self._directory.locate(keys_of(part)):
                addresses = [one.address for one in holders if self._is_alive(one)]
                if not addresses:
                    return sources
                sources.append(addresses)
            at_once = AT_ONCE
        return sources

    def _is_alive(self, holder: Holder) -> bool:
        """Whether a hint may be right: the node may be asked, and has not been started anew since."""
        met = self._peers.boot_id(holder.address)
        return self._peers.usable(holder.address) and met in (b"", holder.boot_id)

    async def _is_computing(self, owner: Holder, span: Span) -> bool:
        match = await self._ask(owner, span, 0.0)
        return match is not None and (bool(match.blocks) or match.miss is MissReason.BEING_WRITTEN)

    async def _ask(self, owner: Holder, span: Span, wait_s: float) -> Match | None:
        """What the owner says of a span; None if it is not there any more."""
        try:
            link = await self._peers.ask(owner.address)
            if link.welcome.boot_id != owner.boot_id:
                return None
            request = say.Lookup(link.next_id(), span, wait_s=wait_s, lease=False)
            return (await link.request(request, say.Matched, ASK_S + wait_s)).match
        except Unreachable as error:
            log.debug("%s", error)
            return None


def first_key(span: Span) -> Key:
    return keys_of(span.from_(0, 1))[0]


def keys_of(span: Span) -> list[Key]:
    return list(map(Key, span.anchors(), span.names))
