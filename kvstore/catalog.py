"""The committed blocks: their names, pins and kinship, and which of them may be evicted.

A block is a candidate for eviction when no lease pins it and no committed block continues it. The policy chooses
among candidates; this module sees to it that it knows exactly those.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import msgspec

from kvferry.common.hashing import BlockName
from kvferry.common.store_api import Located, MissReason
from kvferry.kvstore.eviction import EvictionPolicy
from kvferry.kvstore.slots import SlotTable, in_steps

MAX_GHOSTS = 65536  # names that were here once, kept to tell why they are not


class Committed(msgspec.Struct, eq=False, gc=False):
    """A block. `pins` counts the leases that hold it, `children` the committed blocks that continue it; `last_use` is
    in seconds on the index's clock.

    A block that left the catalog while pinned (quarantined) stays an object that its leases may unpin.
    """

    name: BlockName
    parent: BlockName
    tenant: str
    located: Located
    last_use: float
    pins: int = 0
    children: int = 0
    candidate: bool = False

    @property
    def slot(self) -> int:
        return self.located.slot


class Catalog:
    """Owns the committed part of `table`."""

    def __init__(self, table: SlotTable, policy: EvictionPolicy):
        self._table = table
        self._policy = policy
        self._blocks: dict[BlockName, Committed] = {}
        self._names: dict[str, set[BlockName]] = {}  # of each tenant that has blocks here
        self._orphans: dict[BlockName, int] = {}  # committed children of parents that are not here
        self._ghosts: OrderedDict[BlockName, MissReason] = OrderedDict()
        self._leaving: dict[int, Committed] = {}  # erased while leased, by slot

    def __contains__(self, name: BlockName) -> bool:
        return name in self._blocks

    def leading(self, names: Sequence[BlockName]) -> list[Committed]:
        """The blocks of the leading names that are here."""
        found = []
        for name in names:
            if (block := self._blocks.get(name)) is None:
                break
            found.append(block)
        return found

    def get(self, name: BlockName) -> Committed | None:
        return self._blocks.get(name)

    def why_missing(self, name: BlockName) -> MissReason:
        return self._ghosts.get(name, MissReason.NEVER_STORED)

    def add(self, block: Committed) -> None:
        """A new block, whose slot the table has committed."""
        self._ghosts.pop(block.name, None)
        self._blocks[block.name] = block
        if (names := self._names.get(block.tenant)) is None:
            names = self._names[block.tenant] = set()
        names.add(block.name)
        block.children = self._orphans.pop(block.name, 0)
        parent = self._blocks.get(block.parent)
        if parent is None:
            self._orphans[block.parent] = self._orphans.get(block.parent, 0) + 1
        else:
            block.parent = parent.name  # the same bytes: kept once
            parent.children += 1
            self._refresh(parent)
        self._refresh(block)

    def pin(self, blocks: Iterable[Committed], now: float) -> None:
        for block in blocks:
            block.pins += 1
            block.last_use = now
            if block.candidate:
                self._refresh(block)

    def unpin(self, blocks: Iterable[Committed]) -> None:
        for block in blocks:
            block.pins -= 1
            if block.pins or block.children:
                continue
            if self._leaving.get(block.slot) is block:
                del self._leaving[block.slot]
                self._table.evict(block.slot)
            else:
                self._refresh(block)

    def grew(self, tenant: str) -> None:
        """The table has granted slots to `tenant`."""
        self._policy.grew(tenant, self._table.held[tenant])

    def evict_for(self, tenant: str) -> bool:
        """Free one slot for `tenant`, if the policy finds a victim."""
        name = self._policy.victim(tenant, self._table.held, self._table.slots)
        if name is None:
            return False
        block = self._blocks[name]
        self._remove(block, MissReason.EVICTED)
        self._table.evict(block.slot)
        return True

    def quarantine(self, name: BlockName, slot: int) -> bool:
        """Take a bad block out, if `name` is in `slot` still. Its children stay, for a parent published again."""
        block = self._blocks.get(name)
        if block is None or block.slot != slot:
            return False
        self._remove(block, MissReason.PAYLOAD_BAD)
        self._table.quarantine(slot)
        return True

    def erase(self, tenant: str) -> int:
        """Take all blocks of a tenant out; how many. The slots of leased ones follow when their leases end."""
        blocks = [self._blocks[name] for name in self._names.get(tenant, ())]
        for block in blocks:
            self._remove(block, MissReason.EVICTED)
            if block.pins:
                self._leaving[block.slot] = block
            else:
                self._table.evict(block.slot)
        return len(blocks)

    def checking(self, pins: dict[int, int]) -> Iterator[None]:
        """A check in steps. `pins`: how many leases hold each block, by `id(block)`. Raises RuntimeError."""
        blocks, table = self._blocks, self._table
        yield from table.checking(chain((block.slot for block in blocks.values()), self._leaving))
        for some in in_steps(self._leaving.values()):
            if any(block.pins < 1 or block.pins != pins.get(id(block), 0) for block in some):
                raise RuntimeError("an erased block stays in its slot for no lease")
            yield
        for names in in_steps(self._ghosts):
            if any(name in blocks for name in names) or len(self._ghosts) > MAX_GHOSTS:
                raise RuntimeError("a committed name is remembered as gone, or too many are")
            yield
        candidates = []
        children: Counter[BlockName] = Counter()  # those met, less those counted, where that is not zero
        for some in in_steps(blocks.items()):
            for name, block in some:
                if name != block.name or table.committed[block.slot] != block.tenant:
                    raise RuntimeError("a block is filed under another name or tenant")
                if block.pins != pins.get(id(block), 0):
                    raise RuntimeError(f"a block counts {block.pins} leases; {pins.get(id(block), 0)} hold it")
                if block.candidate != (not block.pins and not block.children):
                    raise RuntimeError("a block that may not go is a candidate for eviction, or one that may is not")
                if block.candidate:
                    candidates.append(name)
                for parent, difference in ((name, -block.children), (block.parent, 1)):
                    children[parent] += difference
                    if not children[parent]:
                        del children[parent]
            yield
        for some in in_steps(self._orphans.items()):
            if any(parent in blocks or children.pop(parent, 0) != count for parent, count in some):
                raise RuntimeError("children are miscounted")
            yield
        if children:
            raise RuntimeError("children are miscounted")
        found = 0
        for some in in_steps((tenant, name) for tenant, names in self._names.items() for name in names):
            found += len(some)
            if any(name not in blocks or blocks[name].tenant != tenant for tenant, name in some):
                raise RuntimeError("a tenant is said to have a block that is not here, or not its own")
            yield
        if found != len(blocks) or not all(self._names.values()):
            raise RuntimeError(f"the tenants have {found} blocks; {len(blocks)} are here")
        yield from self._policy.checking(candidates, table.held)

    def _remove(self, block: Committed, reason: MissReason) -> None:
        del self._blocks[block.name]
        names = self._names[block.tenant]
        names.remove(block.name)
        if not names:
            del self._names[block.tenant]
        if block.children:
            self._orphans[block.name], block.children = block.children, 0
        self._refresh(block)
        if (parent := self._blocks.get(block.parent)) is not None:
            parent.children -= 1
            self._refresh(parent)
        elif self._orphans[block.parent] > 1:
            self._orphans[block.parent] -= 1
        else:
            del self._orphans[block.parent]
        self._ghosts[block.name] = reason
        if len(self._ghosts) > MAX_GHOSTS:
            self._ghosts.popitem(last=False)

    def _refresh(self, block: Committed) -> None:
        """Tell the policy if this block became or ceased to be a candidate."""
        may_go = not block.pins and not block.children and self._blocks.get(block.name) is block
        if may_go and not block.candidate:
            self._policy.add(block.name, block.tenant, block.last_use)
        elif block.candidate and not may_go:
            self._policy.remove(block.name)
        block.candidate = may_go
