"""What a connection to the index holds: leases on blocks that are there, and names that it computes or brings."""

import msgspec

from kvferry.common.hashing import BlockName
from kvferry.kvstore.catalog import Committed
from kvferry.kvstore.slots import Writing

COUNTERS = (
    "published",
    "brought",
    "sent",
    "already_there",
    "publish_dropped",
    "late_commits",
    "bad_blocks",
    "evicted",
    "erased",
    "lookups",
    "blocks_looked_up",
    "blocks_found",
)


class Connection(msgspec.Struct, eq=False):
    """`bringing`: what it reserves is not being computed, but on its way here from another host."""

    expires: float
    bringing: bool = False
    leases: dict[int, "Lease"] = {}
    reserved: int = 0  # names reserved, with or without a slot
    writing: int = 0  # slots in writing, also those whose reservation is gone


class Lease(msgspec.Struct, eq=False):
    """`pinned` may hold blocks that were quarantined since; unpinning those is harmless."""

    connection: Connection
    pinned: list[Committed] = []
    pending: dict[BlockName, "Pending"] = {}


class Pending(msgspec.Struct, eq=False):
    """A name that somebody is computing. Reserved while `writing` is None."""

    name: BlockName
    parent: BlockName
    anchor: BlockName
    tenant: str
    lease: Lease
    writing: Writing | None = None
