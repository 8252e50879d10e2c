"""The block tables of all sequences that hold blocks: how they grow, share blocks, and part when one of them writes.

They stand as rows of one array as well, so that a step's tables are one copy.
"""

from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np

from kvferry.engine.page_pool import PagePool
from kvferry.engine.sequence import Sequence


class BlockTables:
    """Keeps `block_table` and `table_row` of sequences, and holds the pool's blocks for them. The scheduler owns it."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._rows = np.zeros((16, 16), dtype=np.int64)  # block ids; what stands behind a table means nothing
        self._free_rows = list(range(16))
        self._copies: dict[int, tuple[int, int]] = {}  # of the next step, by sequence
        self._left: Counter[int] = Counter()  # blocks that are copied from, held until the step is done
        self._of_tenant: dict[str, Counter[int]] = {}  # in how many of its tables each block stands

    def open(self, seq: Sequence, reused: list[int]) -> None:
        """Give a sequence these blocks and fresh ones for the rest of its tokens and one more. There must be enough."""
        self._pool.hold(reused)
        fresh = self._pool.allocate(seq.blocks_needed - len(reused))
        if fresh is None:
            raise AssertionError(f"sequence {seq.id} was let in and there are no blocks for it")
        seq.block_table = reused + fresh
        self._enter(seq)

    def share(self, seq: Sequence, branches: Iterable[Sequence]) -> None:
        """Branches of `seq` stand in its blocks too. The last one, if it is partial, is copied once they write."""
        seq.shares_tail = seq.num_computed % seq.block_size > 0
        for branch in branches:
            branch.shares_tail = seq.shares_tail
            self._pool.hold(branch.block_table)
            self._enter(branch)

    def fit(self, seq: Sequence, end: int) -> bool:
        """Make a table cover `end` tokens, and what is written next its own. False if the pool has no block left: once
        it has, call again."""
        while len(seq.block_table) * seq.block_size < end:
            if (fresh := self._pool.allocate(1)) is None:
                return False
            seq.block_table += fresh
            self._of_tenant[seq.tenant].update(fresh)
            self._put(seq.table_row, len(seq.block_table) - 1, fresh)
        return not seq.shares_tail or self._own_tail(seq)

    def _own_tail(self, seq: Sequence) -> bool:
        """Copy on write. Who is the last one in a shared block keeps it."""
        index = seq.blocks_computed
        shared = seq.block_table[index]
        if self._pool.holders(shared) - self._left[shared] > 1:
            if (own := self._pool.allocate(1)) is None:
                return False
            seq.block_table[index] = own[0]
            self._put(seq.table_row, index, own)
            self._left[shared] += 1
            self._of_tenant[seq.tenant].update(own)
            self._count_out(seq.tenant, [shared])
            self._copies[seq.id] = (shared, own[0])
        seq.shares_tail = False
        return True

    def close(self, seq: Sequence) -> None:
        """Let go of all that a sequence holds. May be repeated."""
        self._pool.release(seq.block_table)
        self._count_out(seq.tenant, seq.block_table)
        self._copies.pop(seq.id, None)
        if seq.table_row >= 0:
            self._free_rows.append(seq.table_row)
        seq.block_table, seq.table_row, seq.shares_tail = [], -1, False

    def held(self, tenant: str, gone: Collection[Sequence] = ()) -> int:
        """How many blocks stand in the tables of a tenant, each counted once, when some of its sequences have gone."""
        tables = self._of_tenant.get(tenant, {})
        freed = Counter(block for seq in gone for block in seq.block_table)
        return len(tables) - sum(count == tables[block] for block, count in freed.items())

    def _count_out(self, tenant: str, blocks: list[int]) -> None:
        """They stand in one table less."""
        if not blocks:
            return
        tables = self._of_tenant[tenant]
        for block in blocks:
            if tables[block] == 1:
                del tables[block]
            else:
                tables[block] -= 1
        if not tables:
            del self._of_tenant[tenant]

    def copies(self) -> np.ndarray:
        """The (from, to) copies that the step to come has to make first, int64 `[C, 2]`."""
        copies, self._copies = list(self._copies.values()), {}
        return np.array(copies, dtype=np.int64).reshape(-1, 2)

    def copies_are_made(self) -> None:
        """The step is done, or there was none: nothing is copied from any more."""
        if self._left:
            left, self._left = self._left, Counter()
            self._pool.release(list(left.elements()))

    def gather(self, rows: np.ndarray, pages: int) -> np.ndarray:
        """The first `pages` entries of some rows, copied: `[len(rows), pages]`."""
        self._widen(pages)
        return self._rows[rows, :pages]

    def _enter(self, seq: Sequence) -> None:
        """It stands in its blocks from now on, and has a row."""
        self._of_tenant.setdefault(seq.tenant, Counter()).update(seq.block_table)
        if not self._free_rows:
            count = len(self._rows)
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._free_rows = list(range(count, 2 * count))
        seq.table_row = self._free_rows.pop()
        self._put(seq.table_row, 0, seq.block_table)

    def _put(self, row: int, index: int, blocks: list[int]) -> None:
        self._widen(index + len(blocks))
        self._rows[row, index : index + len(blocks)] = blocks

    def _widen(self, pages: int) -> None:
        if (width := self._rows.shape[1]) < pages:
            wider = np.zeros((len(self._rows), max(pages, 2 * width)), dtype=np.int64)
            wider[:, :width] = self._rows
            self._rows = wider

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError when a row is not its sequence's table, the pool counts fewer holders, or a tenant's
        blocks are other ones."""
        tables = []
        of_tenant: dict[str, Counter[int]] = {}
        for seq in sequences:
            table = seq.block_table
            tables.append(table)
            if table:
                of_tenant.setdefault(seq.tenant, Counter()).update(table)
            if seq.table_row >= 0 and self._rows[seq.table_row, : len(table)].tolist() != table:
                raise AssertionError(f"sequence {seq.id} has another table in its row")
            if len(set(table)) != len(table):
                raise AssertionError(f"sequence {seq.id} holds a block twice")
        if of_tenant != self._of_tenant:
            raise AssertionError("the blocks of some tenant are not those of its sequences")
        self._pool.check_integrity([*tables, list(self._left.elements())])
