"""The committed blocks: their names, pins and kinship, and which of them may be evicted.

A block is a candidate for eviction when no lease pins it and no committed block continues it. The policy chooses
among candidates; this module sees to it that it knows exactly those.
"""

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from kvferry.common.hashing import BlockName
from kvferry.common.store_api import Located, MissReason
from kvferry.kvstore.eviction import EvictionPolicy
from kvferry.kvstore.slots import SlotTable

MAX_GHOSTS = 65536  # names that were here once, kept to tell why they are not


class Committed(msgspec.Struct, eq=False):
    """A block. `pins` counts the leases that hold it; `last_use` is in seconds on the index's clock.

    A block that left the catalog while pinned (quarantined) stays an object that its leases may unpin.
    """

    name: BlockName
    parent: BlockName
    tenant: str
    located: Located
    last_use: float
    pins: int = 0
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
        self._children: dict[BlockName, int] = {}  # committed children by parent's name, whether that is here or not
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
        self._children[block.parent] = self._children.get(block.parent, 0) + 1
        self._refresh(block)
        self._refresh(self._blocks.get(block.parent))

    def pin(self, block: Committed, now: float) -> None:
        block.pins += 1
        block.last_use = now
        self._refresh(block)

    def unpin(self, block: Committed) -> None:
        block.pins -= 1
        self._refresh(block)
        if not block.pins and self._leaving.get(block.slot) is block:
            del self._leaving[block.slot]
            self._table.evict(block.slot)

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
        blocks = [block for block in self._blocks.values() if block.tenant == tenant]
        for block in blocks:
            self._remove(block, MissReason.EVICTED)
            if block.pins:
                self._leaving[block.slot] = block
            else:
                self._table.evict(block.slot)
        return len(blocks)

    def check_integrity(self, pins: dict[int, int]) -> None:
        """`pins`: how many leases hold each block, by `id(block)`. Raises RuntimeError."""
        blocks = self._blocks
        self._table.check_integrity([*(block.slot for block in blocks.values()), *self._leaving])
        if any(block.pins < 1 or block.pins != pins.get(id(block), 0) for block in self._leaving.values()):
            raise RuntimeError("an erased block stays in its slot for no lease")
        if blocks.keys() & self._ghosts.keys() or len(self._ghosts) > MAX_GHOSTS:
            raise RuntimeError("a committed name is remembered as gone, or too many are")
        children: dict[BlockName, int] = {}
        for name, block in blocks.items():
            children[block.parent] = children.get(block.parent, 0) + 1
            if name != block.name or self._table.committed[block.slot] != block.tenant:
                raise RuntimeError("a block is filed under another name or tenant")
            if block.pins != pins.get(id(block), 0):
                raise RuntimeError(f"a block counts {block.pins} leases; {pins.get(id(block), 0)} hold it")
        if children != self._children:
            raise RuntimeError("children are miscounted")
        if any(block.candidate != (not block.pins and block.name not in children) for block in blocks.values()):
            raise RuntimeError("a block that may not go is a candidate for eviction, or one that may is not")
        self._policy.check_integrity(block.name for block in blocks.values() if block.candidate)

    def _remove(self, block: Committed, reason: MissReason) -> None:
        del self._blocks[block.name]
        self._refresh(block)
        self._children[block.parent] -= 1
        if not self._children[block.parent]:
            del self._children[block.parent]
        self._refresh(self._blocks.get(block.parent))
        self._ghosts[block.name] = reason
        if len(self._ghosts) > MAX_GHOSTS:
            self._ghosts.popitem(last=False)

    def _refresh(self, block: Committed | None) -> None:
        """Tell the policy if this block became or ceased to be a candidate."""
        if block is None:
            return
        here = self._blocks.get(block.name) is block
        may_go = here and not block.pins and block.name not in self._children
        if may_go and not block.candidate:
            self._policy.add(block.name, block.tenant, block.last_use)
        elif block.candidate and not may_go:
            self._policy.remove(block.name)
        block.candidate = may_go
