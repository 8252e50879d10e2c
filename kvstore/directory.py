"""Which node may hold which block, as hints: any answer may be stale, late or missing, and none makes a token wrong."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvferry.common.hashing import BlockName


class Key(NamedTuple):
    """A block in the directory. `anchor`: the name at which its segment of the chain begins (`Span.anchors`)."""

    anchor: BlockName
    name: BlockName


class Holder(NamedTuple):
    """A store node at one start of its process. `address`: host:port at which other nodes reach it."""

    address: str
    boot_id: bytes


class Directory(Protocol):
    """Belongs to one node, the `Holder` it was made with. No method raises for a directory that is slow, gone, flushed
    or failed over; it answers as if nobody had said anything."""

    async def announce(self, keys: Sequence[Key]) -> None:
        """Say that this node has these blocks now, or has used them. Hints lapse after an hour and are overwritten."""
        ...

    async def locate(self, keys: Sequence[Key]) -> list[tuple[Holder, ...]]:
        """For each key, who else may have it (not this node): at most two, without repeats."""
        ...

    async def claim(self, key: Key, *, instead_of: Holder | None = None) -> Holder | None:
        """Claim the fill that begins with a missing block. None: it is ours (or nobody can tell); else whose it is.

        A claim lapses after two seconds unless it is renewed. `instead_of` takes one over whose owner was found not to
        be computing: it is overwritten if it is still theirs.
        """
        ...

    async def renew(self, keys: Sequence[Key]) -> None:
        """Keep claims of ours for two more seconds."""
        ...

    async def close(self) -> None: ...
