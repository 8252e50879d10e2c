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

    `tiles [rows * kv_heads * pages]`, row first, then head: shorter rows are padded with their first block. `width` is
    the longest row's count of positions. `hidden`: row (from `start` on) and position of what is gathered and not seen,
    below `width`; it may hold anything.
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
    tokens = (ragged.lengths == 1).nonzero().flatten()
    contexts = ragged.contexts[tokens]
    low = torch.zeros_like(contexts) if window is None else (contexts - window).clamp_(min=0)  # first position seen
    skipped = low // block_size
    pages, order = (-(-contexts // block_size) - skipped).sort(descending=True, stable=True)
    rows, skipped = tokens[order], skipped[order]
    low, high = low[order] - skipped * block_size, contexts[order] - skipped * block_size
    cuts = [*cut(pages.tolist(), most_tiles // kv_heads), len(rows)]
    sizes = torch.tensor([stop - start for start, stop in pairwise(cuts)], dtype=torch.int64)
    widest = pages[cuts[:-1]].repeat_interleave(sizes)
    ends = high.tolist()
    widths = [max(ends[start:stop]) for start, stop in pairwise(cuts)]

    row, page = runs(widest)
    page = torch.where(page < pages[row], page, 0) + skipped[row]
    blocks = ragged.tables[rows[row], page].split((widest[cuts[:-1]] * sizes).tolist()) if len(rows) else []

    unseen = low + torch.tensor(widths, dtype=torch.int64).repeat_interleave(sizes) - high
    row, at = runs(unseen)
    at = torch.where(at < low[row], at, at + (high - low)[row])
    row = row - torch.tensor(cuts[:-1], dtype=torch.int64).repeat_interleave(sizes)[row]
    bounds = [0, *unseen.cumsum(0).tolist()]

    heads, groups = torch.arange(kv_heads)[:, None], []
    for (start, stop), own, width in zip(pairwise(cuts), blocks, widths, strict=True):
        hidden = slice(bounds[start], bounds[stop])
        tiles = (own.view(stop - start, 1, -1) * kv_heads + heads).flatten()
        pairs = (row[hidden], at[hidden]) if hidden.start < hidden.stop else None
        groups.append(DecodeGroup(start, stop, len(own) // (stop - start), width, tiles, pairs))
    return DecodeRows(ragged.starts[rows], groups)


def cut(pages: list[int], most: int) -> list[int]:
    """Where groups begin, for rows of falling numbers of pages: a group has at most `most` with its padding, or is one
    row."""
    cuts: list[int] = []
    for i, count in enumerate(pages):
        widest = pages[cuts[-1]] if cuts else 0
        if not cuts or (i + 1 - cuts[-1]) * widest > most or count < widest - max(PAD_PAGES, widest // 4):
            cuts.append(i)
    return cuts


def runs(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`0 .. counts[i] - 1` for each i, end to end: the i of each, and the number."""
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


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
