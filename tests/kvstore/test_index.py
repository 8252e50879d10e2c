"""The index against a model that a reader can check by eye: plain dicts, no structure kept in step."""

import hypothesis.strategies as st
import pytest
from counting import bytecodes
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from spans import span

from kvferry.common.clock import ManualClock
from kvferry.common.store_api import Claim, MissReason
from kvferry.kvstore import slots as slots_module
from kvferry.kvstore.eviction import FairLru
from kvferry.kvstore.index import Index
from kvferry.kvstore.protocol import CommitOutcome, ProtocolError, Written

LEASE_S = 10.0
SLOTS = 6
SUMS = b"c" * 16
ROOT = b"root".ljust(32)
# Three chains that fork: a0-a1-a2-a3, a0-a1-b2-b3, c0-c1-c2-c3.
NAMES = {text: text.encode().ljust(32) for text in ["a0", "a1", "a2", "a3", "b2", "b3", "c0", "c1", "c2", "c3"]}
CHAINS = [[NAMES[t] for t in chain.split()] for chain in ("a0 a1 a2 a3", "a0 a1 b2 b3", "c0 c1 c2 c3")]
PARENTS = {name: parent for chain in CHAINS for name, parent in zip(chain, [ROOT, *chain], strict=False)}


def make_index(clock, slots=SLOTS, writing=4):
    index = Index(FairLru(), clock, lease_s=LEASE_S, writing_per_connection=writing, boot_id=b"b" * 16)
    index.divide(slots, 4096)
    return index


def written(name, slot):
    return Written(name, PARENTS[name], slot, b"", SUMS)


class Leased:
    """The model of a lease: the (name, slot) pairs it pins, the names it has reserved (granted slot or None)."""

    def __init__(self):
        self.pins = []
        self.pending = {}


class IndexMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.clock = ManualClock()
        self.index = make_index(self.clock)
        self.expires = {}  # connection -> time
        self.leases = {}  # (connection, lease) -> Leased
        self.ended = set()  # (connection, lease) lapsed or released
        self.committed = {}  # name -> slot
        self.writing = {}  # slot -> (connection or None, name, lease)
        self.orphans = []  # (time, slot)
        self.quarantined = 0
        self.late = self.bad = 0
        self.connect()
        self.connect()

    # -- the model's own time --

    def pass_time(self):
        now = self.clock.now()
        for connection, expires in self.expires.items():
            if expires <= now:
                self.end_leases(connection)
        for when, slot in self.orphans:
            if when <= now:
                del self.writing[slot]
        self.orphans = [(when, slot) for when, slot in self.orphans if when > now]

    def end_leases(self, connection):
        for key in [key for key in self.leases if key[0] == connection]:
            del self.leases[key]
            self.ended.add(key)

    def pending(self):
        return {name: key for key, lease in self.leases.items() for name in lease.pending}

    def pinned(self):
        return {pin for lease in self.leases.values() for pin in lease.pins}

    # -- rules --

    @rule()
    def connect(self):
        if len(self.expires) < 4:
            self.expires[self.index.connect()] = self.clock.now() + LEASE_S

    @rule(data=st.data())
    def disconnect(self, data):
        connection = self.some_connection(data)
        self.index.disconnect(connection)
        self.end_leases(connection)
        del self.expires[connection]
        for slot, (owner, name, lease) in self.writing.items():
            if owner == connection:
                self.writing[slot] = (None, name, lease)
                self.orphans.append((self.clock.now() + 1.0, slot))
        if not self.expires:
            self.connect()

    @rule(data=st.data())
    def renew(self, data):
        connection = self.some_connection(data)
        self.index.renew(connection)
        self.expires[connection] = self.clock.now() + LEASE_S

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 4.0, 9.0]))
    def advance(self, seconds):
        self.clock.advance(seconds)
        self.index.tick()
        self.pass_time()

    @rule(data=st.data(), chain=st.sampled_from(CHAINS), length=st.integers(1, 4), lease=st.booleans())
    def lookup(self, data, chain, length, lease):
        connection, names = self.some_connection(data), chain[:length]
        before = self.index.stats()
        match = self.index.lookup(connection, names, lease=lease)
        expect = []
        for name in names:
            if name not in self.committed:
                break
            expect.append(self.committed[name])
        assert [block.slot for block in match.blocks] == expect
        if len(expect) == len(names):
            assert match.miss is None
        elif names[len(expect)] in self.pending():
            assert match.miss is MissReason.BEING_WRITTEN
        else:
            assert match.miss in (MissReason.NEVER_STORED, MissReason.EVICTED, MissReason.PAYLOAD_BAD)
        if not lease:
            assert match.lease == 0
            assert self.index.stats() == before
        assert bool(match.lease) == (lease and bool(expect))
        if match.lease:
            model = self.leases[connection, match.lease] = Leased()
            model.pins = expect

    @rule(
        data=st.data(),
        chain=st.sampled_from(CHAINS),
        start=st.integers(0, 3),
        length=st.integers(1, 4),
        tenant=st.sampled_from("xy"),
    )
    def reserve(self, data, chain, start, length, tenant):
        connection, names = self.some_connection(data), chain[start : start + length]
        taken = self.pending()
        got = self.index.reserve(connection, span(names, PARENTS[names[0]]), tenant=tenant)
        model = Leased()
        for name, claim in zip(names, got.claims, strict=True):
            if name in self.committed:
                assert claim is Claim.PRESENT
                model.pins.append((name, self.committed[name]))
            elif name in taken:
                assert claim is Claim.TAKEN
            else:
                assert claim is Claim.GRANTED
                model.pending[name] = None
        assert bool(got.lease) == bool(model.pins or model.pending)
        if got.lease:
            self.leases[connection, got.lease] = model

    @rule(data=st.data())
    def grant(self, data):
        key = self.some_lease(data)
        if key is None:
            return
        connection, number = key
        lease = self.leases.get(key)
        mine = [name for name, slot in lease.pending.items() if slot is None] if lease else []
        names = mine[: data.draw(st.integers(1, 4))] or data.draw(st.sampled_from(CHAINS))
        claims, slots = self.index.grant(connection, number, names)
        self.follow_evictions()
        for name, claim, slot in zip(names, claims, slots, strict=True):
            if claim is Claim.GRANTED:
                assert lease is not None, "a slot was granted under a lease that is over"
                assert slot not in self.writing
                assert slot not in self.committed.values()
                lease.pending[name] = slot
                self.writing[slot] = (connection, name, number)
            elif claim is Claim.PRESENT:
                assert name in self.committed
            elif lease and lease.pending.get(name, 0) is None:
                del lease.pending[name]
        assert sum(owner == connection for owner, _, _ in self.writing.values()) <= 4

    @rule(data=st.data())
    def commit(self, data):
        slot = self.some_writing(data)
        if slot is None:
            return
        connection, name, number = self.writing[slot]
        (outcome,) = self.index.commit(connection, number, [written(name, slot)])
        del self.writing[slot]
        lease = self.leases.get((connection, number))
        if lease and lease.pending.get(name) == slot:
            assert outcome is CommitOutcome.COMMITTED
            del lease.pending[name]
            self.committed[name] = slot
            lease.pins.append((name, slot))
        elif name in self.committed:
            assert outcome is CommitOutcome.PRESENT
        else:
            assert outcome is CommitOutcome.LATE
            self.late += 1

    @rule(data=st.data(), keep=st.booleans())
    def abort(self, data, keep):
        slot = self.some_writing(data)
        if slot is None:
            return
        connection, name, number = self.writing.pop(slot)
        self.index.abort(connection, [slot], keep=keep)
        lease = self.leases.get((connection, number))
        if lease and lease.pending.get(name) == slot:
            lease.pending[name] = None
            if not keep:
                del lease.pending[name]

    @rule(data=st.data())
    def release(self, data):
        key = self.some_lease(data)
        if key is None:
            return
        assert self.index.release(*key) == (key in self.leases)
        if self.leases.pop(key, None):
            self.ended.add(key)

    @rule(name=st.sampled_from(sorted(NAMES.values())), slot=st.integers(0, SLOTS - 1))
    def quarantine(self, name, slot):
        hit = self.committed.get(name) == slot
        assert self.index.quarantine(name, slot) == hit
        if hit:
            del self.committed[name]
            self.quarantined = 1  # of six slots, one may be in quarantine at a time
            self.bad += 1

    @rule(data=st.data(), slot=st.integers(0, SLOTS - 1))
    def commit_what_is_not_mine(self, data, slot):
        connection = self.some_connection(data)
        if slot in self.writing and self.writing[slot][0] == connection:
            return
        with pytest.raises(ProtocolError):
            self.index.commit(connection, 1, [written(NAMES["a0"], slot)])
        with pytest.raises(ProtocolError):
            self.index.abort(connection, [slot])

    # -- what always holds --

    @invariant()
    def agrees(self):
        self.pass_time()
        self.index.check_integrity()
        stats = self.index.stats()
        assert stats.free + stats.writing + stats.committed + stats.quarantined == stats.slots == SLOTS
        assert stats.writing == len(self.writing)
        assert stats.committed == len(self.committed)
        assert stats.quarantined == self.quarantined
        assert stats.leases == len(self.leases)
        assert stats.connections == len(self.expires)
        assert stats.late_commits == self.late
        assert stats.bad_blocks == self.bad
        assert stats.reserved == sum(slot is None for x in self.leases.values() for slot in x.pending.values())
        self.index.take_settled()

    # -- helpers --

    def follow_evictions(self):
        """Learn which blocks a grant evicted, and check that they were allowed to go."""
        for name in list(self.committed):
            if not self.index.lookup(next(iter(self.expires)), [name], lease=False).blocks:
                assert (name, self.committed[name]) not in self.pinned(), "a leased block was evicted"
                del self.committed[name]

    def some_connection(self, data):
        return data.draw(st.sampled_from(sorted(self.expires)), label="connection")

    def some_lease(self, data):
        keys = [key for key in sorted({*self.leases, *self.ended}) if key[0] in self.expires]
        return data.draw(st.sampled_from(keys), label="lease") if keys else None

    def some_writing(self, data):
        slots = sorted(slot for slot, (owner, _, _) in self.writing.items() if owner is not None)
        return data.draw(st.sampled_from(slots), label="slot") if slots else None


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=150, stateful_step_count=50, deadline=None, print_blob=True)


def publish(index, connection, names, tenant="x"):
    """Reserve, grant and commit; the lease."""
    got = index.reserve(connection, span(names, PARENTS[names[0]]), tenant=tenant)
    _, slots = index.grant(connection, got.lease, names)
    pairs = [(n, s) for n, s in zip(names, slots, strict=True) if s is not None]
    index.commit(connection, got.lease, [written(name, slot) for name, slot in pairs])
    return got.lease


def test_what_is_not_committed_is_invisible_and_says_why():
    index = make_index(ManualClock())
    writer, reader = index.connect(), index.connect()
    names = CHAINS[0]
    assert index.lookup(reader, names, lease=True).miss is MissReason.NEVER_STORED
    got = index.reserve(writer, span(names), tenant="x")
    assert index.lookup(reader, names, lease=True).miss is MissReason.BEING_WRITTEN
    assert index.being_computed(names) == names[0]
    _, slots = index.grant(writer, got.lease, names[:1])
    index.commit(writer, got.lease, [written(names[0], slots[0])])
    assert index.take_settled() == [names[0]]
    assert index.being_computed(names) == names[1]
    assert index.being_computed(names[:1]) is None
    match = index.lookup(reader, names, lease=True)
    assert [block.slot for block in match.blocks] == [slots[0]]
    assert match.miss is MissReason.BEING_WRITTEN
    assert index.reserve(reader, span(names), tenant="x").claims == (Claim.PRESENT, *[Claim.TAKEN] * 3)


def test_a_lapse_ends_everything_and_is_not_undone_by_a_later_heartbeat():
    clock = ManualClock()
    index = make_index(clock)
    writer, reader = index.connect(), index.connect()
    got = index.reserve(writer, span(CHAINS[0]), tenant="x")
    _, slots = index.grant(writer, got.lease, CHAINS[0][:2])
    clock.advance(LEASE_S)
    index.renew(reader)
    index.renew(writer)
    assert sorted(index.take_settled()) == sorted(CHAINS[0])
    assert index.stats().writing == 2, "the writer may still write there"
    assert index.release(writer, got.lease) is False
    assert index.reserve(reader, span(CHAINS[0]), tenant="x").claims == (Claim.GRANTED,) * 4
    blocks = [written(name, slot) for name, slot in zip(CHAINS[0], slots, strict=False)]
    assert index.commit(writer, got.lease, blocks) == (CommitOutcome.LATE,) * 2
    assert (index.stats().late_commits, index.stats().writing, index.stats().free) == (2, 0, SLOTS)
    index.check_integrity()


def test_a_late_copy_of_what_somebody_else_committed_is_told_so():
    clock = ManualClock()
    index = make_index(clock)
    slow, quick = index.connect(), index.connect()
    name = CHAINS[0][0]
    got = index.reserve(slow, span([name]), tenant="x")
    _, slots = index.grant(slow, got.lease, [name])
    clock.advance(LEASE_S)
    index.renew(quick)
    publish(index, quick, [name])
    assert index.commit(slow, got.lease, [written(name, slots[0])]) == (CommitOutcome.PRESENT,)
    assert index.stats().already_there == 1


def test_slots_of_a_closed_connection_come_back_a_second_later():
    clock = ManualClock()
    index = make_index(clock)
    writer = index.connect()
    got = index.reserve(writer, span(CHAINS[0]), tenant="x")
    index.grant(writer, got.lease, CHAINS[0][:2])
    index.disconnect(writer)
    assert (index.stats().writing, index.stats().reserved) == (2, 0)
    clock.advance(0.99)
    assert index.stats().writing == 2
    clock.advance(0.01)
    assert index.stats().free == SLOTS


def test_writing_is_bounded_by_connection():
    index = make_index(ManualClock(), writing=2)
    connection = index.connect()
    got = index.reserve(connection, span(CHAINS[0]), tenant="x")
    claims, _ = index.grant(connection, got.lease, CHAINS[0])
    assert claims == (Claim.GRANTED, Claim.GRANTED, Claim.REFUSED, Claim.REFUSED)
    assert index.stats().publish_dropped == 2
    assert index.stats().reserved == 0, "nobody should wait for a block that was dropped"


def test_nothing_is_granted_after_the_first_that_cannot_be():
    index = make_index(ManualClock())
    connection = index.connect()
    got = index.reserve(connection, span(CHAINS[0]), tenant="x")
    claims, slots = index.grant(connection, got.lease, [CHAINS[0][0], NAMES["c0"], CHAINS[0][1]])
    assert claims == (Claim.GRANTED, Claim.REFUSED, Claim.REFUSED)
    assert slots[1:] == (None, None)
    assert index.stats().reserved == 2


def test_nobody_commits_or_aborts_what_another_writes():
    index = make_index(ManualClock())
    owner, other = index.connect(), index.connect()
    got = index.reserve(owner, span(CHAINS[0][:1]), tenant="x")
    _, (slot,) = index.grant(owner, got.lease, CHAINS[0][:1])
    with pytest.raises(ProtocolError):
        index.commit(other, got.lease, [written(CHAINS[0][0], slot)])
    with pytest.raises(ProtocolError):
        index.abort(other, [slot])
    assert index.stats().writing == 1


def test_a_full_arena_refuses_and_drops():
    index = make_index(ManualClock(), slots=2)
    one, two = index.connect(), index.connect()
    publish(index, one, CHAINS[0][:2])
    got = index.reserve(two, span(CHAINS[2]), tenant="y")
    assert index.grant(two, got.lease, CHAINS[2])[0] == (Claim.REFUSED,) * 4
    assert index.stats().publish_dropped == 4
    index.disconnect(one)
    got = index.reserve(two, span(CHAINS[2]), tenant="y")
    assert index.grant(two, got.lease, CHAINS[2])[0][0] is Claim.GRANTED
    assert len(index.lookup(two, CHAINS[0], lease=True).blocks) == 1
    assert index.lookup(two, CHAINS[0][1:], lease=True).miss is MissReason.EVICTED


def test_children_of_a_bad_block_are_reached_again_when_it_is_published_again():
    index = make_index(ManualClock())
    connection = index.connect()
    index.release(connection, publish(index, connection, CHAINS[0][:3]))
    head = index.lookup(connection, CHAINS[0][:1], lease=False).blocks[0]
    assert index.quarantine(CHAINS[0][0], head.slot)
    assert index.quarantine(CHAINS[0][0], head.slot) is False
    assert index.lookup(connection, CHAINS[0], lease=True).miss is MissReason.PAYLOAD_BAD
    publish(index, connection, CHAINS[0][:1])
    assert len(index.lookup(connection, CHAINS[0], lease=True).blocks) == 3
    index.check_integrity()


def test_a_commit_must_be_for_what_was_granted():
    index = make_index(ManualClock())
    connection = index.connect()
    name = CHAINS[0][0]
    got = index.reserve(connection, span([name]), tenant="x")
    _, (slot,) = index.grant(connection, got.lease, [name])
    for wrong in (
        Written(NAMES["c0"], ROOT, slot, b"", SUMS),
        Written(name, NAMES["c0"], slot, b"", SUMS),
        Written(name, ROOT, slot + 1, b"", SUMS),
    ):
        with pytest.raises(ProtocolError):
            index.commit(connection, got.lease, [wrong])
    with pytest.raises(ProtocolError):
        index.commit(connection, got.lease + 1, [written(name, slot)])
    assert index.commit(connection, got.lease, [written(name, slot)]) == (CommitOutcome.COMMITTED,)


def test_a_block_that_is_its_own_parent_leaves_nothing_reserved():
    index = make_index(ManualClock())
    bringing, other = index.connect(bringing=True), index.connect()
    a0, a1 = CHAINS[0][:2]
    for names in ([a0, a1, a1], [ROOT, a0]):
        with pytest.raises(ProtocolError, match="its own parent"):
            index.reserve(bringing, span(names), tenant="x")
    assert (index.stats().reserved, index.stats().leases) == (0, 0)
    assert index.lookup(other, [a0, a1], lease=True).coming == 0
    assert index.reserve(other, span([a0, a1]), tenant="x").claims == (Claim.GRANTED,) * 2
    index.check_integrity()


def many(count, tenants=1):
    """An index full of blocks, each one a chain of its own, of so many tenants in turn; and a connection to it."""
    index = make_index(ManualClock(), slots=count, writing=count)
    connection = index.connect()
    for number in range(count):
        store(index, connection, f"n{number}", f"t{number % tenants}")
    return index, connection


def store(index, connection, text, tenant):
    name = text.encode().ljust(32)
    got = index.reserve(connection, span([name], ROOT), tenant=tenant)
    _, (slot,) = index.grant(connection, got.lease, [name])
    index.commit(connection, got.lease, [Written(name, ROOT, slot, b"", SUMS)])
    index.release(connection, got.lease)


def test_a_tenant_is_erased_without_a_look_at_the_others():
    taken = []
    for count in (50, 1000):
        index, connection = many(count)
        store(index, connection, "mine", "me")
        taken.append(bytecodes(lambda index=index: index.erase("me")))
        assert (index.stats().erased, index.stats().committed) == (1, count - 1)
        index.check_integrity()
    assert taken[0] == taken[1], "the steps grow with what others have"


def steps_of_a_check(index):
    """The bytecodes of each step."""
    checking, taken, going = index.checking(), [], True

    def step():
        nonlocal going
        going = next(checking, "over") is None

    while going:
        taken.append(bytecodes(step))
    return taken


@pytest.mark.parametrize("leased", [False, True])
def test_a_check_goes_in_steps_that_do_not_grow(leased, monkeypatch):
    """Whether all blocks may be evicted, or none."""
    monkeypatch.setattr(slots_module, "STEP", 50)
    longest = []
    for count in (100, 3000):
        index, connection = many(count)
        for number in range(count if leased else 0):
            index.lookup(connection, [f"n{number}".encode().ljust(32)], lease=True)
        taken = steps_of_a_check(index)
        assert len(taken) > count / 50
        longest.append(max(taken))
    print("bytecodes of the longest step:", longest)
    assert longest[1] < 1.2 * longest[0]


def damage(index, what):
    catalog, table = index._catalog, index._table
    block, other = list(catalog._blocks.values())[-2:]
    match what:
        case "pins":
            block.pins += 1
        case "children":
            block.children += 1
        case "an orphan":
            catalog._orphans[b"o" * 32] = 1
        case "the names of a tenant":
            catalog._names["t0"].remove(block.name)
        case "the tenant of a name":
            catalog._names["t1"] = {block.name}
            catalog._names["t0"].remove(block.name)
        case "a ghost":
            catalog._ghosts[block.name] = MissReason.EVICTED
        case "a candidate":
            block.candidate = False
        case "an unknown candidate":
            catalog._policy.remove(block.name)
        case "two in one slot":
            block.located = other.located
        case "a slot outside":
            table.free.append(-1)
        case "a slot that is lost":
            table.committed.pop(block.slot)
        case "slots held":
            table.held["t0"] += 1


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("pins", "a block counts 1 leases; 0 hold it"),
        ("children", "candidate|children are miscounted"),
        ("an orphan", "children are miscounted"),
        ("the names of a tenant", "the tenants have 2 blocks; 3 are here"),
        ("the tenant of a name", "not its own"),
        ("a ghost", "remembered as gone"),
        ("a candidate", "may not go is a candidate"),
        ("an unknown candidate", "unknown to the eviction policy"),
        ("two in one slot", "disagree on which slots are committed"),
        ("a slot outside", "not a partition"),
        ("a slot that is lost", "not a partition"),
        ("slots held", "miscounted"),
    ],
)
def test_a_check_sees_damage(what, told):
    index, _ = many(3)
    index.check_integrity()
    damage(index, what)
    with pytest.raises(RuntimeError, match=told):
        index.check_integrity()
