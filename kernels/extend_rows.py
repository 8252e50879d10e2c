"""How rows of several tokens are attended to on the CPU, and where their keys and values lie: index arithmetic only.

A tile is the `[block_size, head_dim]` keys or values of one block, KV head and layer; `block * kv_heads + kv_head` is
its number in every layer. With a window, blocks that no token of a row sees are left out, and positions are counted
from the first block that is not.
"""

from dataclasses import dataclass

import torch

from kvferry.kernels.reference import Ragged, first_seen, visible


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


def extend_rows(
    ragged: Ragged, block_size: int, kv_heads: int, window: int | None, piece: int, whole: bool, least: int
) -> list[ExtendRow]:
    """Rows of at least `least` tokens, in pieces of at most `piece` tokens, so that what a mask hides is never more
    than a little; `whole`: those that need no mask, being causal from their first token on, in one."""
    if int(ragged.lengths.max()) < least:
        return []
    heads, found = torch.arange(kv_heads)[:, None], []
    for place, context, blocks in ragged.rows(block_size):
        length = place.stop - place.start
        if length >= least:
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
