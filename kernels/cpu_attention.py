"""Paged attention on the CPU in plain torch operators, without fresh memory for what it gathers.

A group of rows has its keys gathered from their blocks into a buffer that stays in the cores' caches, is attended to
from there, and then its values, into the same buffer. Gathering copies whole `[block_size, head_dim]` tiles: seen from
one layer's first K or V tile, those of all blocks and heads lie at one stride, so one list of tiles serves all layers.
Held to `reference`, its twin.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvferry.kernels.reference import Ragged
from kvferry.kernels.row_groups import DecodeRows, ExtendRow, decode_rows, extend_rows, mask_of_pieces

GATHER_BYTES = 2**21  # for one group's keys, so that they are still in L2 when they are read
PIECE = 256  # tokens of a row with a prefix that are attended to at once
MOST_SCORES = 2**24  # at once, where all are kept (64 MiB)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores come about: `reference.extend_attention` says what each is."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's rows as a layer with one window sees them; `mask` is that of `row_groups.mask_of_pieces`."""

    decode: DecodeRows
    extend: list[ExtendRow]
    mask: torch.Tensor | None


class CpuAttention:
    """One step's attention over `pool[num_blocks, kv_heads, layers, 2, block_size, head_dim]`, contiguous.

    What it returns is new memory. What grows with the contexts stays in `workspace`, but for a step's lists of tiles (8
    bytes each) and the mask of rows of several tokens.
    """

    def __init__(self, pool: torch.Tensor, workspace: "Workspace", ragged: Ragged, slot_mapping: torch.Tensor):
        _, self._kv_heads, self._layers, _, self._block_size, self._head_dim = pool.shape
        self._pool, self._workspace, self._ragged = pool, workspace, ragged
        self._longest = int(ragged.contexts.max())
        self._rows: dict[tuple[int | None, bool], Rows] = {}
        block, offset = slot_mapping // self._block_size, slot_mapping % self._block_size
        first_tile = (block[:, None] * self._kv_heads + torch.arange(self._kv_heads)) * self._layers * 2
        self._slots = (first_tile * self._block_size + offset[:, None]).flatten()  # vectors of layer 0's keys

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the new tokens' `key` and `value`, `[T, kv_heads, head_dim]` each."""
        vectors = self._pool.view(-1, self._head_dim)
        for tile, new in ((2 * layer, key), (2 * layer + 1, value)):
            vectors[tile * self._block_size :].index_copy_(0, self._slots, new.reshape(-1, self._head_dim))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`query[T, H, head_dim]` -> the same shape: each token over its row's context up to itself, as
        `reference.extend_attention` says."""
        if window is not None and window >= self._longest:
            window = None
        plain = softcap is None and sinks is None
        if (window, plain) not in self._rows:
            self._rows[window, plain] = self._lay_out(window, plain, query)
        rows, scoring = self._rows[window, plain], Scoring(scale, softcap, sinks)
        out = query.new_empty(query.shape)
        if rows.decode.groups:
            self._decode(layer, rows.decode, query, scoring, out)
        for row in rows.extend:
            self._extend(layer, row, rows.mask, query, scoring, out)
        return out

    def _lay_out(self, window: int | None, plain: bool, query: torch.Tensor) -> Rows:
        sizes = self._block_size, self._kv_heads
        wide = torch.promote_types(query.dtype, torch.float32)
        element_bytes = wide.itemsize + (self._pool.element_size() if wide is not self._pool.dtype else 0)
        tile_bytes = self._block_size * self._head_dim * element_bytes
        piece = PIECE if plain else max(1, min(PIECE, MOST_SCORES // (query.shape[1] * self._longest)))
        extend = extend_rows(self._ragged, *sizes, window, piece, whole=plain)
        decode = decode_rows(self._ragged, *sizes, window, GATHER_BYTES // tile_bytes)
        return Rows(decode, extend, mask_of_pieces(extend, window, query.dtype))

    def _decode(self, layer: int, rows: DecodeRows, query: torch.Tensor, scoring: Scoring, out: torch.Tensor) -> None:
        """One token each: its query heads of one KV head are the rows of a product."""
        wide = torch.promote_types(query.dtype, torch.float32)
        asked = query.index_select(0, rows.tokens).to(wide).mul_(scoring.scale)
        attended = torch.empty_like(asked)
        for group in rows.groups:
            of_group = slice(group.start, group.stop)
            per_head = ((group.stop - group.start) * self._kv_heads, -1, self._head_dim)

            def hide(scores: torch.Tensor, hidden: tuple[torch.Tensor, torch.Tensor] | None = group.hidden) -> None:
                if hidden is not None:
                    scores.unflatten(0, (-1, self._kv_heads))[hidden[0], :, :, hidden[1]] = -torch.inf

            keys = self._gather("tiles", layer, 0, group.tiles, wide).view(per_head)[:, : group.width]
            weights = self._weights(asked[of_group].view(per_head), keys, 1, scoring, hide)
            values = self._gather("tiles", layer, 1, group.tiles, wide).view(per_head)[:, : group.width]
            if group.hidden is not None:  # a weight of 0 does not make NaN nothing
                values.unflatten(0, (-1, self._kv_heads))[group.hidden[0], :, group.hidden[1]] = 0
            torch.bmm(weights, values, out=attended[of_group].view(per_head))
        out.index_copy_(0, rows.tokens, attended.to(query.dtype))

    def _extend(
        self,
        layer: int,
        row: ExtendRow,
        mask: torch.Tensor | None,
        query: torch.Tensor,
        scoring: Scoring,
        out: torch.Tensor,
    ) -> None:
        """Several tokens of one row, a piece at a time."""
        plain = scoring.softcap is None and scoring.sinks is None
        dtype = query.dtype if plain else torch.promote_types(query.dtype, torch.float32)
        shape = (self._kv_heads, -1, self._head_dim)
        keys = self._gather("tiles", layer, 0, row.tiles, dtype).view(shape)
        values = self._gather("values", layer, 1, row.tiles, dtype).view(shape)
        for piece in row.pieces:
            of_piece = keys[:, piece.positions], values[:, piece.positions]
            # [kv_heads, group, length, head_dim]: the query heads of one KV head together.
            asked = query[piece.tokens].unflatten(1, (self._kv_heads, -1)).permute(1, 2, 0, 3).to(dtype)
            length, width = asked.shape[2], of_piece[0].shape[1]
            own_mask = None if row.causal else mask[mask.shape[0] - length :, mask.shape[1] - width :]
            if plain:
                attended = fused(asked, *of_piece, own_mask, scoring.scale)
            else:
                attended = self._products(asked, *of_piece, own_mask, scoring)
            out[piece.tokens] = attended.permute(2, 0, 1, 3).flatten(1, 2)

    def _products(
        self, asked: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """What `fused` does, with softcap and sinks."""
        rows = (asked * scoring.scale).flatten(1, 2)
        length = asked.shape[2]

        def hide(scores: torch.Tensor) -> None:
            scores.unflatten(1, (-1, length)).add_(mask)

        return torch.bmm(self._weights(rows, keys, length, scoring, hide), values).view_as(asked)

    def _weights(
        self,
        asked: torch.Tensor,
        keys: torch.Tensor,
        length: int,
        scoring: Scoring,
        hide: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        """`asked[N, M, head_dim]` (scaled), `keys[N, width, head_dim]` -> `[N, M, width]` in the workspace, until the
        next one. In N KV heads run fastest, in M the `length` tokens; `hide` puts -inf where nothing is seen."""
        shape = (*asked.shape[:2], keys.shape[1] + (scoring.sinks is not None))
        scores, weights = (self._workspace.take(name, shape, asked.dtype) for name in ("scores", "weights"))
        seen = scores[..., : keys.shape[1]]
        torch.bmm(asked, keys.transpose(1, 2), out=seen)
        if scoring.softcap is not None:
            seen.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        hide(seen)
        if scoring.sinks is not None:
            column = scores[..., -1].unflatten(0, (-1, self._kv_heads)).unflatten(2, (-1, length))
            column[:] = scoring.sinks.to(asked.dtype).view(self._kv_heads, -1, 1)
        return torch.softmax(scores, -1, out=weights)[..., : keys.shape[1]]

    def _gather(self, name: str, layer: int, which: int, tiles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The keys (`which` 0) or values (1) of tiles, `[len(tiles), block_size * head_dim]` in the workspace, until
        the next gathering under that name."""
        size = self._block_size * self._head_dim
        tile_count, stride = self._pool.shape[0] * self._kv_heads, 2 * self._layers * size
        of_layer = self._pool.as_strided((tile_count, size), (stride, 1), (2 * layer + which) * size)
        gathered = self._workspace.take(name, (len(tiles), size), self._pool.dtype)
        torch.index_select(of_layer, 0, tiles, out=gathered)
        if dtype is self._pool.dtype:
            return gathered
        return self._workspace.take(name, gathered.shape, dtype).copy_(gathered)


def fused(
    asked: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """torch's own fused attention, which never has all scores at once: `asked[kv_heads, group, length, head_dim]` ->
    the same shape, with `keys` and `values` `[kv_heads, width, head_dim]`; without a mask, causal from 0 on."""
    shape = (*asked.shape[:2], *keys.shape[1:])
    keys, values = keys.unsqueeze(1).expand(shape), values.unsqueeze(1).expand(shape)
    return F.scaled_dot_product_attention(asked, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale)


class Workspace:
    """Buffers kept from step to step: fresh memory would be touched for the first time at each use."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What was taken under this name and dtype before, in a new shape; grows by doubling."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < count:
            buffer = torch.empty(max(count, 0 if buffer is None else 2 * len(buffer)), dtype=dtype)
            self._buffers[name, dtype] = buffer
        return buffer[:count].view(shape)
