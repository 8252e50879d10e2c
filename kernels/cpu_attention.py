"""Paged attention on the CPU. Held to `reference`, its twin.

Rows of one token are in `cpu_decode`. Those of several are attended to here, one by one, in plain torch operators: keys
and values are gathered from their blocks as whole `[block_size, head_dim]` tiles, into memory that is kept.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvferry.kernels.cpu_decode import CpuDecode
from kvferry.kernels.extend_rows import ExtendRow, extend_rows, mask_of_pieces
from kvferry.kernels.reference import Ragged, Scoring
from kvferry.kernels.workspace import Workspace, tiles_of_layer
from kvferry.kernels.write_kernel import SlotWriter

PIECE = 256  # tokens of a row with a prefix that are attended to at once
MOST_SCORES = 2**24  # at once, where all are kept (64 MiB)


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's rows as layers of one kind see them; `mask` is that of `extend_rows.mask_of_pieces`."""

    decode: CpuDecode | None
    extend: list[ExtendRow]
    mask: torch.Tensor | None


class CpuAttention:
    """One step's attention over `pool[num_blocks, kv_heads, layers, 2, block_size, head_dim]`, contiguous.

    What it returns is new memory. What grows with the contexts stays in `workspace`, but for a step's lists of tiles (8
    bytes each), of what rows of different contexts do not see, and the mask of rows of several tokens.
    """

    def __init__(self, pool: torch.Tensor, workspace: Workspace, ragged: Ragged, slot_mapping: torch.Tensor):
        _, self._kv_heads, _, _, self._block_size, self._head_dim = pool.shape
        self._pool, self._workspace, self._ragged = pool, workspace, ragged
        self._tokens = int(ragged.lengths.sum())
        self._longest = int(ragged.contexts.max())
        self._rows: dict[tuple[int | None, bool], Rows] = {}
        self._writer = SlotWriter(pool, slot_mapping)
        self._written: tuple[int, torch.Tensor, torch.Tensor] | None = None  # a layer's new keys and values

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the new tokens' `key` and `value`, `[T, kv_heads, head_dim]` each."""
        self._writer.write(layer, key, value)
        if len(key) == self._tokens:  # they are the batch's own
            self._written = (layer, key, value)

    def attend(self, layer: int, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """`query[T, H, head_dim]` -> the same shape: each token over its row's context up to itself, as
        `reference.extend_attention` says."""
        window, sinks = scoring.window, scoring.sinks is not None
        if window is not None and window >= self._longest:
            window = None
        kind = (window, scoring.softcap is None and not sinks)
        if kind not in self._rows:
            self._rows[kind] = self._lay_out(*kind, query)
        rows, out = self._rows[kind], query.new_empty(query.shape)
        if rows.decode is not None:
            rows.decode.attend(layer, query, scoring, out)
        for row in rows.extend:
            self._extend(layer, row, rows.mask, query, scoring, out)
        return out

    def _lay_out(self, window: int | None, plain: bool, query: torch.Tensor) -> Rows:
        sizes, heads = (self._block_size, self._kv_heads), query.shape[1]
        decode = None
        if CpuDecode.takes(self._ragged, self._pool.dtype):
            decode = CpuDecode(self._pool, self._workspace, self._ragged, window, heads)
        piece = PIECE if plain else max(1, min(PIECE, MOST_SCORES // (heads * self._longest)))
        extend = extend_rows(self._ragged, *sizes, window, piece, plain, 1 if decode is None else 2)
        return Rows(decode, extend, mask_of_pieces(extend, window, query.dtype))

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
        keys, values = self._seen(layer, row, dtype)
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

    def _seen(self, layer: int, row: ExtendRow, dtype: torch.dtype) -> list[torch.Tensor]:
        """A row's keys and values, `[kv_heads, positions, head_dim]` each. All of a causal row's are new, so those that
        were written last are at hand as they came."""
        if row.causal and self._written is not None and self._written[0] == layer:
            new = [tensor[row.pieces[0].tokens].transpose(0, 1) for tensor in self._written[1:]]
            if all(tensor.dtype is self._pool.dtype for tensor in new):
                return [tensor.to(dtype) for tensor in new]
        return [
            self._gather(name, tiles, row.tiles, dtype)
            for name, tiles in zip(("keys", "values"), tiles_of_layer(self._pool, layer), strict=True)
        ]

    def _gather(self, name: str, tiles: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[kv_heads, positions, head_dim]` in the workspace, until the next gathering under that name."""
        gathered = self._workspace.take(name, (len(wanted), tiles.shape[1]), tiles.dtype)
        torch.index_select(tiles, 0, wanted, out=gathered)
        if dtype is not tiles.dtype:
            gathered = self._workspace.take(name, gathered.shape, dtype).copy_(gathered)
        return gathered.view(self._kv_heads, -1, self._head_dim)

    def _products(
        self, asked: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """What `fused` does, in two products, with softcap and sinks; scores and weights are in the workspace."""
        sinks, (kv_heads, group, length, _), width = scoring.sinks, asked.shape, keys.shape[1]
        shape = (kv_heads, group * length, width + (sinks is not None))
        scores, weights = (self._workspace.take(name, shape, asked.dtype) for name in ("scores", "weights"))
        seen = scores[..., :width]
        torch.bmm((asked * scoring.scale).flatten(1, 2), keys.transpose(1, 2), out=seen)
        if scoring.softcap is not None:
            seen.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        seen.unflatten(1, (group, length)).add_(mask)
        if sinks is not None:
            scores[..., -1].unflatten(1, (group, length)).copy_(sinks.view(kv_heads, group, 1))
        torch.softmax(scores, -1, out=weights)
        return torch.bmm(weights[..., :width], values).view_as(asked)


def fused(
    asked: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """torch's own fused attention, which never has all scores at once: `asked[kv_heads, group, length, head_dim]` ->
    the same shape, with `keys` and `values` `[kv_heads, width, head_dim]`; without a mask, causal from 0 on."""
    shape = (*asked.shape[:2], *keys.shape[1:])
    keys, values = keys.unsqueeze(1).expand(shape), values.unsqueeze(1).expand(shape)
    return F.scaled_dot_product_attention(asked, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale)
