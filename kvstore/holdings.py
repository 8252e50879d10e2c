"""What a connection to the index holds: leases on blocks that are there, and names that it computes or brings."""

from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec

from kvferry.common.hashing import BlockName
from kvferry.kvstore.catalog import Committed
from kvferry.kvstore.slots import Writing, in_steps

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


def checking(
    connections: Mapping[int, Connection], pending: Mapping[BlockName, Pending], writing: Mapping[int, Writing]
) -> Iterator[None]:
    """A check, in steps, of what the connections hold against the names that are pending and the slots in writing, by
    name and by slot. Raises RuntimeError."""
    owned, writes = 0, Counter(one.owner for one in writing.values())
    for number, connection in connections.items():
        reserved = 0
        for leases in in_steps(connection.leases.values()):
            for lease in leases:
                reserved += len(lease.pending)
                for one in lease.pending.values():
                    if pending.get(one.name) is not one:
                        raise RuntimeError("the leases and the index disagree on what is being computed")
                    if one.writing is not None and writing.get(one.writing.slot) is not one.writing:
                        raise RuntimeError("a name is being written to a slot that is not in writing")
            yield
        if connection.reserved != reserved or connection.writing != writes[number]:
            raise RuntimeError(
                f"connection {number} counts {connection.reserved} reserved and {connection.writing} writing; "
                f"it has {reserved} and {writes[number]}"
            )
        owned += reserved
    if owned != len(pending):
        raise RuntimeError("the leases and the index disagree on what is being computed")
