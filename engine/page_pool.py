"""Bookkeeping of a worker's KV memory: which block is free, who holds it, and under which name it can be found.

A block is *held* (by block tables and by copies under way, counted) or *free*. A free block keeps its name and its
bytes until it is needed for something else, so a later sequence with the same prefix finds it: least recently freed
goes first, and of one sequence the tail before the head.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvferry.common.hashing import BlockName


class PagePool:
    """`num_blocks` blocks with ids `0 .. num_blocks - 1`. Owned by one thread."""

    def __init__(self, num_blocks: int):
        if num_blocks < 1:
            raise ValueError(f"a page pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.on_room: Callable[[], None] = lambda: None  # called whenever a block has become free
        self._name_of: dict[int, BlockName] = {}
        self._owner_of: dict[int, str] = {}  # of those that have a name
        self._by_name: dict[BlockName, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` free blocks, nameless and held once each, in ascending order (runs of neighbours are read faster
        than scattered blocks); None, and nothing taken, if there are fewer."""
        if count > len(self._free):
            return None
        blocks = sorted(self._free.popitem(last=False)[0] for _ in range(count))
        for block in blocks:
            self._holders[block] = 1
            if (name := self._name_of.pop(block, None)) is not None:
                del self._by_name[name], self._owner_of[block]
        return blocks

    def match(self, names: Sequence[BlockName]) -> list[int]:
        """The blocks of the leading names that are in the pool. They are not held yet: `hold` them before anything
        else is allocated."""
        blocks = []
        for name in names:
            if (block := self._by_name.get(name)) is None:
                break
            blocks.append(block)
        return blocks

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def free_beside(self, blocks: Sequence[int]) -> int:
        """How many blocks are free that are not among `blocks`."""
        return len(self._free) - sum(self._holders[block] == 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add one holder to each block."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one holder from each block of a table in chain order."""
        before = len(self._free)
        for block in reversed(blocks):
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is released more often than it was held")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._name_of:
                    self._free.move_to_end(block, last=False)  # nothing in it can be reused: take it first
        if len(self._free) > before:
            self.on_room()

    def name(self, block: int, name: BlockName, owner: str = "") -> None:
        """Say that a held block now contains all of `name`'s KV, which is `owner`'s. The first block of a name keeps
        it."""
        if self._holders[block] < 1:
            raise ValueError(f"block {block} is named while nobody holds it")
        if block not in self._name_of and name not in self._by_name:
            self._name_of[block] = name
            self._by_name[name] = block
            self._owner_of[block] = owner

    def forget(self, owner: str) -> int:
        """Take an owner's blocks their names: nobody finds them any more, and free ones are used first. How many."""
        blocks = [block for block, its in self._owner_of.items() if its == owner]
        for block in blocks:
            del self._owner_of[block], self._by_name[self._name_of.pop(block)]
            if block in self._free:
                self._free.move_to_end(block, last=False)
        return len(blocks)

    def check_integrity(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Raises AssertionError when holders, the free list and the names disagree, or a block has fewer holders than
        `tables` it stands in."""
        for block, count in Counter(block for table in tables for block in table).items():
            if self._holders[block] < count:
                raise AssertionError(f"block {block} is in {count} tables and has {self._holders[block]} holders")
        free = {block for block, holders in enumerate(self._holders) if holders == 0}
        if min(self._holders) < 0 or free != set(self._free):
            raise AssertionError(f"free list {sorted(self._free)} is not the set of unheld blocks {sorted(free)}")
        if {name: block for block, name in self._name_of.items()} != self._by_name:
            raise AssertionError("names and blocks do not map onto each other")
        if self._owner_of.keys() != self._name_of.keys():
            raise AssertionError("a block has a name and no owner, or the other way round")
