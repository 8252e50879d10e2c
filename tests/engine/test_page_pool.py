"""The page pool against a plain model of what it promises."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvferry.engine.page_pool import PagePool

NAMES = [bytes([i]) for i in range(8)]


class PoolMachine(RuleBasedStateMachine):
    """Tables hold blocks; the model knows holders and names by block, and the order in which free blocks go."""

    @initialize(blocks=st.integers(1, 9))
    def start(self, blocks):
        self.pool = PagePool(blocks)
        self.tables: list[list[int]] = []
        self.free = list(range(blocks))  # next to go first
        self.names: dict[int, bytes] = {}
        self.owners: dict[bytes, str] = {}

    def holders(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    @rule(count=st.integers(0, 4))
    def allocate(self, count):
        got = self.pool.allocate(count)
        if count > len(self.free):
            assert got is None
            return
        assert got == sorted(self.free[:count])
        del self.free[:count]
        for block in got:
            self.names.pop(block, None)
        self.tables.append(got)

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    def match_and_hold(self, names):
        expected = []
        where = {name: block for block, name in self.names.items()}
        for name in names:
            if name not in where:
                break
            expected.append(where[name])
        found = self.pool.match(names)
        assert found == expected
        self.pool.hold(found)
        self.free = [block for block in self.free if block not in found]
        self.tables.append(found)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def hold_more(self, data):
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        self.pool.hold(table)
        self.tables.append(list(table))

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), name=st.sampled_from(NAMES), owner=st.sampled_from("xy"))
    def name(self, data, name, owner):
        block = data.draw(st.sampled_from([block for table in self.tables for block in table]))
        self.pool.name(block, name, owner)
        if block not in self.names and name not in self.names.values():
            self.names[block] = name
            self.owners[name] = owner

    @rule(owner=st.sampled_from("xy"))
    def forget(self, owner):
        """Its free blocks go first from now on, in whatever order; held ones stay with those who hold them."""
        theirs = [block for block, name in self.names.items() if self.owners[name] == owner]
        assert self.pool.forget(owner) == len(theirs)
        for block in theirs:
            del self.names[block]
            if block in self.free:
                self.free.remove(block)
                self.free.insert(0, block)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in reversed(table):
            if not self.holders(block):
                self.free.insert(len(self.free) if block in self.names else 0, block)

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def misuse(self, data):
        block = data.draw(st.sampled_from(self.free))
        with pytest.raises(ValueError, match="released more often"):
            self.pool.release([block])
        with pytest.raises(ValueError, match="nobody holds"):
            self.pool.name(block, NAMES[0])

    @invariant()
    def holds(self):
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            assert self.pool.num_free == len(self.free)
            assert [self.pool.match([name]) for name in NAMES] == [
                [block for block, its in self.names.items() if its == name] for name in NAMES
            ]

    def teardown(self):
        for table in getattr(self, "tables", []):
            self.pool.release(table)
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            assert self.pool.num_free == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestPagePool = PoolMachine.TestCase


def test_the_tail_goes_before_the_head_and_the_nameless_before_all():
    pool = PagePool(6)
    table = pool.allocate(4)
    for block, name in zip(table[:3], NAMES, strict=False):
        pool.name(block, name)
    pool.release(table)
    assert pool.allocate(1) == [table[3]]
    pool.allocate(2)  # the two that were never used
    assert pool.allocate(1) == [table[2]]
    assert pool.match(NAMES[:3]) == table[:2], "what stays is a prefix"


def test_an_owner_that_is_forgotten_leaves_what_is_held_and_nothing_to_find():
    pool = PagePool(6)
    theirs, others = pool.allocate(3), pool.allocate(2)
    for block, name in zip(theirs, NAMES, strict=False):
        pool.name(block, name, "theirs")
    for block, name in zip(others, NAMES[4:], strict=False):
        pool.name(block, name, "others")
    pool.release(others)
    pool.release(theirs[1:])
    assert pool.forget("theirs") == 3
    assert pool.forget("theirs") == 0
    pool.check_integrity([theirs[:1]])
    assert pool.match(NAMES[:3]) == []
    assert pool.match(NAMES[4:6]) == others
    assert pool.holders(theirs[0]) == 1, "a sequence that runs keeps what it has"
    assert set(pool.allocate(2)) == set(theirs[1:]), "and is overwritten first"
    pool.release(theirs[:1])
    assert pool.allocate(1) == theirs[:1]
    assert pool.match(NAMES[4:6]) == others


@pytest.mark.parametrize("damage", ["holders", "names"])
def test_damage_is_seen(damage):
    pool = PagePool(3)
    (block,) = pool.allocate(1)
    pool.name(block, NAMES[0])
    if damage == "holders":
        pool._holders[block] = 0
    else:
        pool._by_name[NAMES[1]] = block
    with pytest.raises(AssertionError):
        pool.check_integrity()


def test_a_pool_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        PagePool(0)
