"""Spans for tests that have names and no chain."""

from collections.abc import Sequence

from kvferry.common.hashing import BlockName, Span

ROOT = BlockName(b"root".ljust(32))


def span(names: Sequence[BlockName], parent: BlockName = ROOT, first: int = 0) -> Span:
    """The names as if the chain, or a segment of it, began with them."""
    return Span(tuple(names), first, parent, names[0] if names else parent)
