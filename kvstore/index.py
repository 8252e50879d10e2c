"""The store's mind: which name has which slot, who leases it, who may write. Pure: no I/O, no tasks, injected time.

    absent -> reserved (a name, an owner, no slot) -> writing (slot granted) -> committed -> evicted

Leases expire by connection: every sign of life pushes the connection's expiry forward, and when it passes, all its
leases and reservations lapse at once, for good. A lease pins committed blocks (found by a look-up, or committed under
a reservation) and holds the names reserved under it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from operator import eq

from kvferry.common.clock import Clock
from kvferry.common.hashing import BlockName, Span
from kvferry.common.store_api import Claim, Located, Match, MissReason, Reservation, StoreStats
from kvferry.kvstore import holdings
from kvferry.kvstore.catalog import Catalog, Committed
from kvferry.kvstore.directory import Key
from kvferry.kvstore.eviction import EvictionPolicy
from kvferry.kvstore.holdings import COUNTERS, Connection, Lease, Pending
from kvferry.kvstore.protocol import MAX_NAMES, CommitOutcome, ProtocolError, Written
from kvferry.kvstore.slots import SlotTable, Writing, in_steps


class Index:
    """All methods are synchronous and atomic. Connections and leases are numbers that are never used again."""

    def __init__(
        self,
        policy: EvictionPolicy,
        clock: Clock,
        *,
        lease_s: float,
        writing_per_connection: int,
        boot_id: bytes,
    ):
        self.changes = 0  # grows with every change, so that an idle node knows whether to check again
        self._clock = clock
        self._block_bytes = 0
        self._lease_s = lease_s
        self._writing_per_connection = writing_per_connection
        self._boot_id = boot_id
        self._table = SlotTable()
        self._catalog = Catalog(self._table, policy)
        self._pending: dict[BlockName, Pending] = {}
        self._connections: dict[int, Connection] = {}
        self._settled: list[BlockName] = []
        self._fresh: list[Key] = []
        self._serial = 0
        self._counts = dict.fromkeys(COUNTERS, 0)

    def divide(self, slots: int, block_bytes: int) -> None:
        """Say, once, how many slots the arena has. Before that there is nothing to grant and nothing to find."""
        self.changes += 1
        self._table.divide(slots)
        self._block_bytes = block_bytes

    # -- connections ---------------------------------------------------------------------------------------------

    def connect(self, *, bringing: bool = False) -> int:
        self.tick()
        self.changes += 1
        self._serial += 1
        self._connections[self._serial] = Connection(self._clock.now() + self._lease_s, bringing)
        return self._serial

    def renew(self, connection: int) -> None:
        """A sign of life. What lapsed before it stays lapsed."""
        self.tick()
        self._connections[connection].expires = self._clock.now() + self._lease_s

    def disconnect(self, connection: int) -> None:
        """The socket closed: everything goes back at once, except slots in writing, which follow a second later."""
        self.tick()
        self._lapse(self._connections.pop(connection))
        self._table.orphan(connection, self._clock.now())

    def tick(self) -> None:
        """Let lapse and reclaim what is due. Every other method does so first; call this when nothing happens."""
        now = self._clock.now()
        for connection in self._connections.values():
            if connection.expires <= now and connection.leases:
                self._lapse(connection)
        if self._table.reclaim(now):
            self.changes += 1

    def take_settled(self) -> list[BlockName]:
        """Names that ceased to be computed since the last call, committed or not: whoever waits may look again."""
        settled, self._settled = self._settled, []
        return settled

    def take_committed(self) -> list[Key]:
        """Blocks that came to be there since the last call, for the directory."""
        fresh, self._fresh = self._fresh, []
        return fresh

    # -- looking up ----------------------------------------------------------------------------------------------

    def lookup(
        self, connection: int, names: Sequence[BlockName], *, lease: bool, again: bool = False, sent: bool = False
    ) -> Match:
        """The leading committed names, and how many behind them are on their way. `lease=False` changes nothing: no
        lease, no recency, no counter. `again`: these names have been counted as looked up. `sent`: it is for another
        node, and counts as that alone."""
        self.tick()
        found = self._catalog.leading(names)
        blocks = tuple([block.located for block in found])
        coming = self._coming(names[len(found) :]) if lease and len(found) < len(names) else 0
        miss = None
        if len(found) + coming < len(names):
            first = names[len(found) + coming]
            miss = MissReason.BEING_WRITTEN if first in self._pending else self._catalog.why_missing(first)
        if not lease:
            return Match(blocks, 0, 0, self._boot_id, miss)
        if sent:
            self._counts["sent"] += len(found)
        else:
            self._counts["lookups"] += not again
            self._counts["blocks_looked_up"] += 0 if again else len(names)
            self._counts["blocks_found"] += len(found)
        if not found:
            return Match((), coming, 0, self._boot_id, miss)
        number, held = self._new_lease(connection)
        self._catalog.pin(found, self._clock.now())
        held.pinned = found
        return Match(blocks, coming, number, self._boot_id, miss)

    def being_computed(self, names: Sequence[BlockName]) -> BlockName | None:
        """The first missing name, if anybody is computing it; that may be another stream of the one who asks."""
        self.tick()
        here = self.missing_from(names)
        return names[here] if here < len(names) and names[here] in self._pending else None

    def missing_from(self, names: Sequence[BlockName]) -> int:
        """How many leading names are committed."""
        return len(self._catalog.leading(names))

    def is_pending(self, name: BlockName) -> bool:
        return name in self._pending

    def is_coming(self, name: BlockName) -> bool:
        """Whether it is on its way from another host."""
        return bool(self._coming((name,)))

    def is_there(self, name: BlockName) -> bool:
        return name in self._catalog

    def is_known(self, name: BlockName) -> bool:
        """Whether a block is there, or will be unless something fails."""
        return name in self._catalog or name in self._pending

    def _coming(self, names: Sequence[BlockName]) -> int:
        """How many leading names, of which the first is not there, are on their way from other hosts. Several may come
        at a time, so later ones may be there already."""
        count = 0
        for name in names:
            pending = self._pending.get(name)
            if not (pending.lease.connection.bringing if pending else count and name in self._catalog):
                break
            count += 1
        return count

    # -- computing and publishing --------------------------------------------------------------------------------

    def reserve(self, connection: int, span: Span, *, tenant: str) -> Reservation:
        self.tick()
        if any(map(eq, span.names, (span.parent, *span.names))):  # before anything is reserved
            raise ProtocolError("a block cannot be its own parent")
        owner = self._connections[connection]
        number, lease = self._new_lease(connection)
        claims = []
        parent = span.parent
        for name, anchor in zip(span.names, span.anchors(), strict=True):
            if (block := self._catalog.get(name)) is not None:
                self._catalog.pin((block,), self._clock.now())
                lease.pinned.append(block)
                claims.append(Claim.PRESENT)
            elif name in self._pending:
                claims.append(Claim.TAKEN)
            elif owner.reserved >= MAX_NAMES:
                claims.append(Claim.REFUSED)
            else:
                self._pending[name] = lease.pending[name] = Pending(name, parent, anchor, tenant, lease)
                owner.reserved += 1
                claims.append(Claim.GRANTED)
            parent = name
        if not lease.pinned and not lease.pending:
            del owner.leases[number]
            number = 0
        return Reservation(tuple(claims), number, self._boot_id)

    def withdraw(self, connection: int, lease: int, names: Sequence[BlockName]) -> None:
        """These names, reserved under `lease` and without a slot, are not to be computed here."""
        self.tick()
        held = self._connections[connection].leases.get(lease)
        for name in names:
            pending = None if held is None else held.pending.get(name)
            if pending is not None and pending.writing is None:
                self._withdraw(pending)

    def grant(
        self, connection: int, lease: int, names: Sequence[BlockName]
    ) -> tuple[tuple[Claim, ...], tuple[int | None, ...]]:
        """Slots for names reserved under `lease`, in order, until one cannot be had. A name that gets none is no
        longer reserved, nor are those after it: their publisher drops them, so nobody should wait for them."""
        self.tick()
        owner = self._connections[connection]
        held = owner.leases.get(lease)
        claims: list[Claim] = []
        slots: list[int | None] = []
        going, grown = True, None
        for name in names:
            pending = None if held is None else held.pending.get(name)
            mine = pending is not None and pending.writing is None
            if going and name in self._catalog:
                self._counts["already_there"] += 1
                claims.append(Claim.PRESENT)
                slots.append(None)
            elif going and mine and self._make_room(owner, pending.tenant):
                pending.writing = self._table.grant(name, pending.tenant, connection)
                owner.writing += 1
                grown = pending.tenant  # the same for all names of a lease
                claims.append(Claim.GRANTED)
                slots.append(pending.writing.slot)
            else:
                going = False
                self._counts["publish_dropped"] += 1
                if mine:
                    self._withdraw(pending)
                claims.append(Claim.REFUSED)
                slots.append(None)
        if grown is not None:
            self._catalog.grew(grown)
        self.changes += 1
        return tuple(claims), tuple(slots)

    def commit(self, connection: int, lease: int, blocks: Sequence[Written]) -> tuple[CommitOutcome, ...]:
        """Make written slots visible, leased by `lease`. Raises ProtocolError at a slot that this connection does
        not write, or at a lease, name or parent other than those it was granted for."""
        self.tick()
        self.changes += 1
        return tuple([self._commit_one(connection, lease, block) for block in blocks])

    def abort(self, connection: int, slots: Sequence[int], *, keep: bool = False) -> None:
        """The owner no longer writes to these slots. With `keep` their names stay reserved. Raises ProtocolError at a
        slot that it was not granted."""
        self.tick()
        self.changes += 1
        for slot in slots:
            writing = self._writing_of(connection, slot)
            pending = self._pending.get(writing.name)
            if pending is not None and pending.writing is writing:
                pending.writing = None
                if not keep:
                    self._withdraw(pending)
            self._table.abort(writing)
            self._connections[connection].writing -= 1

    def release(self, connection: int, lease: int) -> bool:
        """End a lease and everything reserved under it. False when there is no such lease (any more). Slots granted
        under it stay in writing until their commit or abort."""
        self.tick()
        held = self._connections[connection].leases.pop(lease, None)
        if held is None:
            return False
        self._drop(held)
        return True

    def quarantine(self, name: BlockName, slot: int) -> bool:
        """Take a bad block out, if `name` is in `slot` still."""
        self.tick()
        self.changes += 1
        taken_out = self._catalog.quarantine(name, slot)
        self._counts["bad_blocks"] += taken_out
        return taken_out

    def erase(self, tenant: str) -> int:
        """Drop a tenant's blocks, and what it is computing. How many blocks that were; leased ones leave their slots
        when their leases end."""
        self.tick()
        self.changes += 1
        for pending in [one for one in self._pending.values() if one.tenant == tenant]:
            self._withdraw(pending)
        erased = self._catalog.erase(tenant)
        self._counts["erased"] += erased
        return erased

    # -- numbers and truth ---------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        self.tick()
        table = self._table
        by_tenant = table.held - Counter(writing.tenant for writing in table.writing.values())
        return StoreStats(
            boot_id=self._boot_id,
            block_bytes=self._block_bytes,
            slots=table.slots,
            free=len(table.free),
            writing=len(table.writing),
            committed=len(table.committed),
            quarantined=len(table.quarantined),
            reserved=sum(pending.writing is None for pending in self._pending.values()),
            leases=sum(len(connection.leases) for connection in self._connections.values()),
            connections=len(self._connections),
            committed_by_tenant=dict(by_tenant),
            **self._counts,
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError at the first thing that does not hold."""
        for _ in self.checking():
            pass

    def checking(self) -> Iterator[None]:
        """The same, in steps that are short however many blocks are here. Give it up once `changes` has grown."""
        yield from holdings.checking(self._connections, self._pending, self._table.writing)
        pins: Counter[int] = Counter()
        leases = (lease for connection in self._connections.values() for lease in connection.leases.values())
        for some in in_steps(block for lease in leases for block in lease.pinned):
            pins.update(map(id, some))
            yield
        yield from self._catalog.checking(pins)
        for names in in_steps(self._pending):
            if any(name in self._catalog for name in names):
                raise RuntimeError("a name is committed and being computed at once")
            yield

    # -- inside --------------------------------------------------------------------------------------------------

    def _new_lease(self, connection: int) -> tuple[int, Lease]:
        self.changes += 1
        self._serial += 1
        owner = self._connections[connection]
        lease = owner.leases[self._serial] = Lease(owner)
        return self._serial, lease

    def _lapse(self, connection: Connection) -> None:
        leases, connection.leases = connection.leases, {}
        for lease in leases.values():
            self._drop(lease)
        self.changes += 1

    def _drop(self, lease: Lease) -> None:
        """Give back what a lease holds that its connection no longer lists."""
        self.changes += 1
        self._catalog.unpin(lease.pinned)
        for pending in list(lease.pending.values()):
            self._withdraw(pending)

    def _withdraw(self, pending: Pending) -> None:
        """Nobody computes this name any more. A slot granted for it stays in writing."""
        del self._pending[pending.name], pending.lease.pending[pending.name]
        pending.lease.connection.reserved -= 1
        self._settled.append(pending.name)
        self.changes += 1

    def _make_room(self, owner: Connection, tenant: str) -> bool:
        """Whether `owner` may write one more slot and one is free, by eviction if need be. What is brought here is not
        bounded: it is written by the node itself, which gives up a slow sender."""
        if owner.writing >= self._writing_per_connection and not owner.bringing:
            return False
        if self._table.free:
            return True
        evicted = self._catalog.evict_for(tenant)
        self._counts["evicted"] += evicted
        return evicted

    def _writing_of(self, connection: int, slot: int) -> Writing:
        writing = self._table.writing.get(slot)
        if writing is None or writing.owner != connection:
            raise ProtocolError(f"slot {slot} is not being written by this connection")
        return writing

    def _commit_one(self, connection: int, lease: int, block: Written) -> CommitOutcome:
        writing = self._writing_of(connection, block.slot)
        if writing.name != block.name:
            raise ProtocolError(f"slot {block.slot} was granted for another name")
        pending = self._pending.get(block.name)
        owner = self._connections[connection]
        if pending is not None and pending.writing is writing:
            if pending.lease is not owner.leases.get(lease) or pending.parent != block.parent:
                raise ProtocolError(f"slot {block.slot} was granted under another lease or for another parent")
            self._withdraw(pending)
            self._table.commit(writing)
            owner.writing -= 1
            located = Located(writing.slot, block.salt, block.proofs)
            entry = Committed(block.name, block.parent, writing.tenant, located, self._clock.now(), pins=1)
            self._catalog.add(entry)
            pending.lease.pinned.append(entry)
            self._fresh.append(Key(pending.anchor, block.name))
            self._counts["brought" if owner.bringing else "published"] += 1
            return CommitOutcome.COMMITTED
        self._table.abort(writing)
        owner.writing -= 1
        if block.name in self._catalog:
            self._counts["already_there"] += 1
            return CommitOutcome.PRESENT
        self._counts["late_commits"] += 1
        return CommitOutcome.LATE
