"""What a worker may ask of the block store. The store is a cache: every answer may be "no", and none is an error.

One handle, the lease, covers both directions: a look-up leases the blocks it found, a reservation leases each block
from the moment it is published under it. Releasing a lease, or losing the connection, gives everything back.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Literal, Protocol

import msgspec

from kvferry.common.hashing import BlockName, Span


class MissReason(str, Enum):
    """Why a block that was looked up was not used."""

    NEVER_STORED = "never_stored"
    EVICTED = "evicted"
    BEING_WRITTEN = "being_written"
    STORE_UNREACHABLE = "store_unreachable"
    PAYLOAD_BAD = "payload_bad"


class Located(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a leased block lies, a slot of the arena whose boot id the lease carries, and how to verify its bytes.

    `proofs`: 16 bytes a segment, XXH3-128 of a plain block or the tags of a sealed one. `salt`: 16 random bytes that a
    sealed block's key is made with; empty for a plain block.
    """

    slot: int
    salt: bytes
    proofs: bytes


class Match(msgspec.Struct, frozen=True):
    """The answer to a look-up: the leading names that are there.

    `coming`: how many more, right behind them, are on their way from other hosts; to a look-up that leases nothing, how
    many more other hosts seem to have. `lease` is 0 when nothing was leased (no match, or a look-up that asked for
    none). `boot_id` says which arena the slots mean. `miss` is why the first name after all these is not there; None if
    every name is.
    """

    blocks: tuple[Located, ...] = ()
    coming: int = 0
    lease: int = 0
    boot_id: bytes = b""
    miss: MissReason | None = None

    def __len__(self) -> int:
        """Leading names that are there or on their way."""
        return len(self.blocks) + self.coming


class Claim(str, Enum):
    """What a reservation got for one name."""

    GRANTED = "granted"  # ours to compute and publish
    PRESENT = "present"  # committed already; leased with the reservation
    TAKEN = "taken"  # somebody else is computing it, or bringing it here
    REFUSED = "refused"  # the store is not there, or a bound is reached


class Reservation(msgspec.Struct, frozen=True):
    """`claims[i]` is for the span's `names[i]`. `lease` is 0 when nothing was granted or present."""

    claims: tuple[Claim, ...]
    lease: int = 0
    boot_id: bytes = b""


class Payload(msgspec.Struct, frozen=True):
    """A block to publish: its name, its parent's name (the scope's root for a first block), and its bytes."""

    name: BlockName
    parent: BlockName
    data: memoryview


class StoreStats(msgspec.Struct, frozen=True):
    """A node's numbers at one moment. free + writing + committed + quarantined = slots, always."""

    boot_id: bytes = b""
    block_bytes: int = 0
    slots: int = 0
    free: int = 0
    writing: int = 0
    committed: int = 0
    quarantined: int = 0
    reserved: int = 0
    leases: int = 0
    connections: int = 0
    published: int = 0
    brought: int = 0  # from other nodes
    sent: int = 0  # to other nodes
    already_there: int = 0
    publish_dropped: int = 0
    late_commits: int = 0
    evicted: int = 0
    erased: int = 0
    bad_blocks: int = 0
    lookups: int = 0
    blocks_looked_up: int = 0
    blocks_found: int = 0
    directory: Literal["none", "up", "down"] = "none"  # of the cluster, beside what this node knows by itself
    peers_away: int = 0  # other nodes that failed when they were last spoken to, within the last minute
    committed_by_tenant: dict[str, int] = {}


class BlockStore(Protocol):
    """Six verbs. No method raises for a store that is slow, full, restarted or gone; it answers "nothing there".

    `address`: by which other hosts' nodes reach this host's; empty if they cannot.
    """

    address: str

    async def lookup(
        self, span: Span, *, tenant: str = "", wait_s: float = 0.0, lease: bool = True, holder: str = ""
    ) -> Match:
        """Find the leading names of a span that are committed and, unless told otherwise, lease them. What other hosts
        have of the rest begins to come, kept for `tenant` (a pseudonym); `holder` is a store node that should have it
        all, for one that knows better than the directory.

        With `wait_s`, a first missing name that is being computed, on whatever host, is waited for, until all names
        are there or nobody is computing the first missing one. Several streams share a connection, so it may be the
        caller's own: who waits must have reserved nothing. `lease=False` peeks: no lease, no recency, no hit counted,
        and nothing is brought here.
        """
        ...

    async def reserve(self, span: Span, *, tenant: str) -> Reservation:
        """Claim a span's names for computing; takes no memory yet. `tenant` is a pseudonym."""
        ...

    async def publish(self, reservation: Reservation, blocks: Sequence[Payload], seal: bytes | None = None) -> int:
        """Copy blocks that `reservation` granted into the store and commit them, in chain order; sealed with keys made
        of `seal`, the tenant's K(seal), or plain without it.

        Returns how many leading ones are there now (committed by us, or by somebody before us). The rest was dropped.
        The bytes must not change until this returns.
        """
        ...

    async def pull(self, match: Match, into: Sequence[memoryview], seal: bytes | None = None) -> int:
        """Copy the first `len(into)` blocks of a leased match, those that are coming as they come, to their destination
        and verify them there: opened with `seal`, or without it plain ones.

        Returns how many leading blocks are good; destinations from there on hold rubbish. A bad block, or one that is
        plain and should be sealed or the other way round, is quarantined.
        """
        ...

    async def release(self, lease: int) -> bool:
        """Give a lease back, with all that was reserved under it. False if it had lapsed before: then what was
        pulled under it may be torn and must be dropped."""
        ...

    async def stats(self) -> StoreStats | None:
        """The node's numbers; None while it cannot be reached."""
        ...
