"""Paged attention on the CPU in plain torch, without fresh memory for what it gathers.

A row's keys and values are gathered from their blocks into a buffer that stays in cache, then attended to from there.
Gathering copies whole `[block_size, head_dim]` tiles: the pool is seen as a flat list of tiles, of which the one for
(block, kv_head, layer, K or V) is number `((block * kv_heads + kv_head) * layers + layer) * 2 + (0 or 1)`.
Held to `reference`, its twin.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvferry.kernels.reference import Ragged, extend_attention, visible

GROUP_BYTES = 2**22  # gathered at once: fits in a core's share of cache


@dataclass(frozen=True, slots=True)
class RowSpan:
    start: int
    length: int
    context: int
    block_table: torch.Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Rows gathered together. `tiles`: their tiles of layer 0, for each row first all K then all V, `[kv_head][block]`.
    `equal`: decode rows of one context length, attended to in one product."""

    rows: list[RowSpan]
    tiles: torch.Tensor
    equal: bool


class CpuAttention:
    """One step's attention over `pool[num_blocks, kv_heads, layers, 2, block_size, head_dim]`, contiguous."""

    def __init__(self, pool: torch.Tensor, workspace: "Workspace", ragged: Ragged, slot_mapping: torch.Tensor):
        _, self._kv_heads, self._layers, _, self._block_size, self._head_dim = pool.shape
        self._pool, self._ragged = pool, ragged
        self._tiles = pool.view(-1, self._block_size * self._head_dim)
        self._vectors = pool.view(-1, self._head_dim)
        self._workspace = workspace
        self._heads = torch.arange(self._kv_heads)
        spans = ragged.rows(self._block_size)
        rows = [RowSpan(p.start, p.stop - p.start, context, blocks) for p, context, blocks in spans]
        self._groups = [self._group(some) for some in self._split(rows)]
        block, offset = slot_mapping // self._block_size, slot_mapping % self._block_size
        first_tile = (block[:, None] * self._kv_heads + self._heads) * self._layers * 2  # [T, kv_heads]
        self._slots = (first_tile * self._block_size + offset[:, None]).flatten()

    def _split(self, rows: list[RowSpan]) -> list[list[RowSpan]]:
        """Decode rows by context length, so that equal ones meet, in groups of a size that fits; others alone."""
        alone = [[row] for row in rows if row.length > 1]
        groups: list[list[RowSpan]] = []
        size = 0
        for row in sorted((row for row in rows if row.length == 1), key=lambda row: row.context):
            more = len(row.block_table) * 2 * self._kv_heads * self._tiles.shape[1] * self._tiles.element_size()
            if not groups or size + more > GROUP_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(row)
            size += more
        return groups + alone

    def _group(self, rows: list[RowSpan]) -> Group:
        per_row = []
        for row in rows:
            keys = ((row.block_table * self._kv_heads + self._heads[:, None]) * (self._layers * 2)).flatten()
            per_row += [keys, keys + 1]
        equal = rows[0].length == 1 and len({row.context for row in rows}) == 1
        return Group(rows, torch.cat(per_row), equal)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the new tokens' `key` and `value`, `[T, kv_heads, head_dim]` each."""
        slots = self._slots + layer * 2 * self._block_size
        self._vectors.index_copy_(0, slots, key.reshape(-1, self._head_dim))
        self._vectors.index_copy_(0, slots + self._block_size, value.reshape(-1, self._head_dim))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`query[T, H, head_dim]` -> the same shape: each token over its row's context up to itself."""
        if window is not None or softcap is not None or sinks is not None:
            return extend_attention(query, self._pool, layer, self._ragged, scale, window, softcap, sinks)
        out = torch.empty_like(query)
        grouped = query.unflatten(1, (self._kv_heads, -1))
        for group in self._groups:
            gathered = self._gather(group, layer)
            if group.equal:
                self._decode(group, gathered, grouped, out, scale)
                continue
            start = 0
            for row in group.rows:
                count = 2 * self._kv_heads * len(row.block_table)
                keys, values = self._keys_values(gathered[start : start + count], 1, row.context)
                start += count
                if row.length == 1:
                    attended = attend_decode(grouped[row.start], keys[0], values[0], scale)
                    out[row.start] = attended.flatten(0, 1)
                else:
                    tokens = grouped[row.start : row.start + row.length]
                    out[row.start : row.start + row.length] = attend_extend(tokens, keys[0], values[0], scale)
        return out

    def _gather(self, group: Group, layer: int) -> torch.Tensor:
        """The group's tiles of a layer, in the workspace, until the next gather."""
        buffer = self._workspace.tiles(len(group.tiles), self._tiles)
        torch.index_select(self._tiles, 0, group.tiles + 2 * layer, out=buffer)
        return buffer

    def _keys_values(self, tiles: torch.Tensor, rows: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathered tiles of rows with equally many blocks as `[rows, kv_heads, context, head_dim]`, K and V."""
        both = tiles.view(rows, 2, self._kv_heads, -1, self._head_dim)[:, :, :, :context]
        return both[:, 0], both[:, 1]

    def _decode(
        self, group: Group, gathered: torch.Tensor, grouped: torch.Tensor, out: torch.Tensor, scale: float
    ) -> None:
        keys, values = self._keys_values(gathered, len(group.rows), group.rows[0].context)
        starts = [row.start for row in group.rows]
        out[starts] = attend_decode(grouped[starts], keys, values, scale).flatten(1, 2)


def attend_decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One token over its whole context: `query[..., kv_heads, group, head_dim]` -> the same shape, with `keys` and
    `values` `[..., kv_heads, context, head_dim]`. Two plain products read K and V once each."""
    if query.dtype is not torch.float32:  # plain products would round the scores
        return F.scaled_dot_product_attention(query, keys, values, scale=scale)
    weights = torch.matmul(query * scale, keys.transpose(-1, -2)).softmax(-1)
    return torch.matmul(weights, values)


def attend_extend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """A chunk `query[length, kv_heads, group, head_dim]` at the end of its context -> `[length, kv_heads * group,
    head_dim]`, with `keys` and `values` `[kv_heads, context, head_dim]`."""
    length, context = query.shape[0], keys.shape[1]
    heads_first = query.permute(1, 2, 0, 3)
    shape = (*heads_first.shape[:2], context, keys.shape[-1])
    keys, values = keys.unsqueeze(1).expand(shape), values.unsqueeze(1).expand(shape)
    if length == context:
        attended = F.scaled_dot_product_attention(heads_first, keys, values, is_causal=True, scale=scale)
    else:
        mask = visible(length, context, None, query.device)
        attended = F.scaled_dot_product_attention(heads_first, keys, values, attn_mask=mask, scale=scale)
    return attended.permute(2, 0, 1, 3).flatten(1, 2)


class Workspace:
    """The gather buffer, kept from step to step: fresh memory would be touched for the first time at each use."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def tiles(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """`count` rows of the width and dtype of `like`. Grows by doubling."""
        if self._buffer is None or len(self._buffer) < count:
            rows = max(count, 0 if self._buffer is None else 2 * len(self._buffer))
            self._buffer = torch.empty(rows, like.shape[1], dtype=like.dtype)
        return self._buffer[:count]
