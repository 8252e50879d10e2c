"""Which node may hold which block, as hints: any answer may be stale, late or missing, and none makes a token wrong."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple, Protocol

import xxhash

from kvferry.common.clock import Clock
from kvferry.common.hashing import BlockName

HINT_S = 3600.0  # a hint lapses so long after its block was last announced
CLAIM_S = 2.0  # a claim, so long after it was made or renewed
PLACES = 2  # hints kept of a name; a node's address says which of them is its own
MAX_HINTS = 2**18  # in a LocalTable


State = Literal["none", "up", "down"]


class Key(NamedTuple):
    """A block in the directory. `anchor`: the name at which its segment of the chain begins (`Span.anchors`)."""

    anchor: BlockName
    name: BlockName


class Holder(NamedTuple):
    """A store node at one start of its process. `address`: host:port at which other nodes reach it. `boot_id`: 16
    bytes."""

    address: str
    boot_id: bytes


class Directory(Protocol):
    """Belongs to one node, the `Holder` it was made with. No method raises for a directory that is slow, gone, flushed
    or failed over; it answers as if nobody had said anything.

    `state`: whether it answers now; "none" is one of this process alone.
    """

    state: State

    async def announce(self, keys: Sequence[Key]) -> None:
        """Say that this node has these blocks now, or has used them. Returns before others can know.

        Hints lapse after an hour, and are overwritten by nodes whose place is the same.
        """
        ...

    async def locate(self, keys: Sequence[Key]) -> list[tuple[Holder, ...]]:
        """For each key, who else may have it (nobody at this node's address): at most two, without repeats."""
        ...

    async def claim(self, key: Key, *, instead_of: Holder | None = None) -> Holder | None:
        """Claim the fill that begins with a missing block. None: it is ours (or nobody can tell); else whose it is.

        A claim lapses after two seconds unless it is renewed. `instead_of` takes one over whose owner was found not to
        be computing: it is overwritten if it is still theirs, by one of those who try. So is one by this node's own
        address before it restarted.
        """
        ...

    async def renew(self, keys: Sequence[Key]) -> None:
        """Keep claims of ours for two more seconds. One that has lapsed stays so."""
        ...

    async def close(self) -> None: ...


def place_of(address: str) -> int:
    """Which of a name's places a node's hints go to."""
    return xxhash.xxh3_64_intdigest(address.encode()) % PLACES


Said = OrderedDict[Hashable, tuple[Holder, float]]  # in the order in which it was said last, with that time


class LocalTable:
    """What the directories of one process share. One that has a single directory keeps no hints: nobody would read
    them. Beyond `most` hints the oldest go."""

    def __init__(self, clock: Clock, most: int = MAX_HINTS):
        self.directories = 0
        self._clock = clock
        self._most = most
        self._hints: Said = OrderedDict()  # by name and place
        self._claims: Said = OrderedDict()  # by name

    def hint(self, name: BlockName, holder: Holder) -> None:
        if self.directories > 1:
            self._say(self._hints, (name, place_of(holder.address)), holder, HINT_S)
            if len(self._hints) > self._most:
                self._hints.popitem(last=False)

    def holders(self, name: BlockName) -> tuple[Holder, ...]:
        found = (self._read(self._hints, (name, place), HINT_S) for place in range(PLACES))
        return tuple(holder for holder in found if holder is not None)

    def claim(self, name: BlockName, owner: Holder) -> None:
        """Overwrites another's."""
        self._say(self._claims, name, owner, CLAIM_S)

    def owner(self, name: BlockName) -> Holder | None:
        return self._read(self._claims, name, CLAIM_S)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless bounds and order hold."""
        for said in (self._hints, self._claims):
            times = [time for _, time in said.values()]
            if times != sorted(times):
                raise RuntimeError("hints or claims are not in the order in which they were said")
        if len(self._hints) > self._most:
            raise RuntimeError(f"{len(self._hints)} hints are more than {self._most}")
        if any(place != place_of(holder.address) for (_, place), (holder, _) in self._hints.items()):
            raise RuntimeError("a hint is in another node's place")

    def _say(self, said: Said, key: Hashable, holder: Holder, lasts_s: float) -> None:
        now = self._clock.now()
        said[key] = (holder, now)
        said.move_to_end(key)
        while said and next(iter(said.values()))[1] + lasts_s <= now:
            said.popitem(last=False)

    def _read(self, said: Said, key: Hashable, lasts_s: float) -> Holder | None:
        holder, time = said.get(key, (None, 0.0))
        return holder if time + lasts_s > self._clock.now() else None


class LocalDirectory:
    """For the nodes of one process, which share a table; and for the only node there is."""

    state: State = "none"

    def __init__(self, me: Holder, table: LocalTable):
        self._me = me
        self._table = table
        table.directories += 1

    async def announce(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._table.hint(key.name, self._me)

    async def locate(self, keys: Sequence[Key]) -> list[tuple[Holder, ...]]:
        mine = self._me.address
        return [tuple(one for one in self._table.holders(key.name) if one.address != mine) for key in keys]

    async def claim(self, key: Key, *, instead_of: Holder | None = None) -> Holder | None:
        owner = self._table.owner(key.name)
        if owner is not None and owner != instead_of and owner.address != self._me.address:
            return owner
        if owner != self._me:
            self._table.claim(key.name, self._me)
        return None

    async def renew(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if self._table.owner(key.name) == self._me:
                self._table.claim(key.name, self._me)

    async def close(self) -> None:
        self._table.directories -= 1
