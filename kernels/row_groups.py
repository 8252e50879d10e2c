"""Which rows of a step are attended to together on the CPU, and where their keys and values lie: index arithmetic only.

A tile is the `[block_size, head_dim]` keys or values of one block, KV head and layer; `block * kv_heads + kv_head` is
its number in every layer. With a window, blocks that no token of a row sees are left out, and positions are counted
from the first block that is not.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from kvferry.kernels.reference import Ragged, first_seen, visible

PAD_PAGES = 4  # rows this many blocks shorter, or a quarter, are padded rather than left to a group of their own


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one token each: those from `start` to `stop` in the order of `DecodeRows.tokens`.

    `tiles [rows * kv_heads * pages]`, row first, then head: shorter rows are padded with what their table says next.
    `width` is the longest row's count of positions. `hidden`: row (from `start` on) and position of what is not
    seen of what is gathered, below `width`; it may hold anything.
    """

    start: int
    stop: int
    pages: int
    width: int
    tiles: torch.Tensor
    hidden: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """All rows of one token. `tokens`: where they stand in the batch, by falling number of blocks."""

    tokens: torch.Tensor
    groups: list[DecodeGroup]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of a row and the positions that at least one of them sees."""

    tokens: slice
    positions: slice


@dataclass(frozen=True, slots=True)
class ExtendRow:
    """A row of several tokens, `tiles [kv_heads * pages]`, head first. `causal`: it has no prefix, no window, and one
    piece."""

    tiles: torch.Tensor
    pieces: list[Piece]
    causal: bool


def decode_rows(ragged: Ragged, block_size: int, kv_heads: int, window: int | None, most_tiles: int) -> DecodeRows:
    """Rows of one token in groups of at most `most_tiles` tiles (of keys; one row may have more)."""
    rows = (ragged.lengths == 1).nonzero().flatten()
    contexts = ragged.contexts[rows]
    skipped = None if window is None else (contexts - window).clamp_(min=0) // block_size
    pages = (contexts + (block_size - 1)) // block_size
    pages, order = (pages if skipped is None else pages - skipped).sort(descending=True, stable=True)
    rows, contexts = rows[order], contexts[order]
    tables = ragged.tables
    if skipped is not None:
        skipped = skipped[order]
        contexts = contexts - skipped * block_size
    sizes, ends = pages.tolist(), contexts.tolist()
    heads, groups = torch.arange(kv_heads)[:, None], []
    for start, stop in pairwise([*cut(sizes, most_tiles // kv_heads), len(sizes)]):
        own, widest = slice(start, stop), sizes[start]
        if skipped is None:
            blocks = tables[:, :widest].index_select(0, rows[own])
        else:  # a padded row may come to the table's end
            at = (skipped[own, None] + torch.arange(widest)).clamp_(max=tables.shape[1] - 1)
            blocks = tables[rows[own, None], at]
        tiles = (blocks.unsqueeze(1) * kv_heads + heads).view(-1)
        least, most = min(ends[own]), max(ends[own])
        hidden = hidden_positions(contexts[own], least, most, window)
        groups.append(DecodeGroup(start, stop, widest, most, tiles, hidden))
    return DecodeRows(ragged.starts[rows], groups)


def cut(pages: list[int], most: int) -> list[int]:
    """Where groups begin, for rows of falling numbers of pages: a group has at most `most` with its padding, or is one
    row."""
    cuts: list[int] = []
    start = widest = least = 0
    for i, count in enumerate(pages):
        if not cuts or (i + 1 - start) * widest > most or count < least:
            cuts.append(i)
            start, widest, least = i, count, count - max(PAD_PAGES, count // 4)
    return cuts


def hidden_positions(
    ends: torch.Tensor, least: int, most: int, window: int | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Row and position of what a row does not see: from `ends[row]` up to `most`, the last end, and what its window has
    left behind. None if there is no such thing. `least` is the first end."""
    if window is None:
        if least == most:
            return None
        row, at = (torch.arange(least, most) >= ends[:, None]).nonzero(as_tuple=True)
        return row, at + least
    at = torch.arange(most)
    row, at = ((at >= ends[:, None]) | (at < ends[:, None] - window)).nonzero(as_tuple=True)
    return (row, at) if len(row) else None


def extend_rows(
    ragged: Ragged, block_size: int, kv_heads: int, window: int | None, piece: int, whole: bool
) -> list[ExtendRow]:
    """Rows of several tokens, in pieces of at most `piece` tokens, so that what a mask hides is never more than a
    little; `whole`: those that need no mask, being causal from their first token on, in one."""
    if int(ragged.lengths.max()) == 1:
        return []
    heads, found = torch.arange(kv_heads)[:, None], []
    for place, context, blocks in ragged.rows(block_size):
        length = place.stop - place.start
        if length > 1:
            causal = whole and length == context and window is None
            skipped = first_seen(context - length, window) // block_size
            tiles = (blocks[skipped:] * kv_heads + heads).flatten()
            some = pieces(place, context, window, length if causal else piece, skipped * block_size)
            found.append(ExtendRow(tiles, some, causal))
    return found


def pieces(place: slice, context: int, window: int | None, size: int, origin: int) -> list[Piece]:
    """The tokens at `place`, the last ones of `context`; positions are counted from `origin`."""
    found = []
    for start in range(place.start, place.stop, size):
        stop = min(start + size, place.stop)
        end = context - (place.stop - stop)
        begin = first_seen(end - (stop - start), window)
        found.append(Piece(slice(start, stop), slice(begin - origin, end - origin)))
    return found


def mask_of_pieces(rows: list[ExtendRow], window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
    """0 for what is seen, -inf for what is not, `[tokens, positions]` of the largest piece. Each piece's mask is the
    lower right corner of this one: what a token sees depends on its distance only. None: no row needs one."""
    sizes = [(p.tokens, p.positions) for row in rows if not row.causal for p in row.pieces]
    if not sizes:
        return None
    most = (max(tokens.stop - tokens.start for tokens, _ in sizes), max(at.stop - at.start for _, at in sizes))
    seen = visible(*most, window, torch.device("cpu"))
    return torch.zeros(most, dtype=dtype).masked_fill_(~seen, -torch.inf)
