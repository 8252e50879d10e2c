"""Plain torch on a paged KV pool: the truth that other kernels are held to, and the path where there is none.

Shapes used here: `pool[num_blocks, kv_heads, layers, 2, block_size, head_dim]`; `T` new tokens of all rows laid end to
end; `H` query heads, `H = kv_heads * group`. A row's tokens sit at positions `context - length .. context - 1`, and
their keys and values are in the pool already (write first, then attend).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Ragged:
    """R rows of query tokens laid end to end, int64 tensors.

    Row r has the `lengths[r]` tokens from `starts[r]`, the last ones of a context of `contexts[r]` tokens, which lie in
    the blocks `tables[r, : ceil(contexts[r] / block_size)]`; the table's entries after those mean nothing (they are
    valid block ids). `starts`, `lengths` and `contexts` `[R]` are on the CPU, `tables` `[R, P]` on the pool's device.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    contexts: torch.Tensor
    tables: torch.Tensor

    def rows(self, block_size: int) -> Iterator[tuple[slice, int, torch.Tensor]]:
        """Each row's place in the batch, its context, and its blocks."""
        spans = zip(self.starts.tolist(), self.lengths.tolist(), self.contexts.tolist(), self.tables, strict=True)
        for start, length, context, table in spans:
            yield slice(start, start + length), context, table[: -(-context // block_size)]


def kv_write(
    pool: torch.Tensor, layer: int, slot_mapping: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Store the new tokens' keys and values: `slot_mapping[T]` is `block_id * block_size + offset`, `key` and `value`
    are `[T, kv_heads, head_dim]`. Slots must be distinct."""
    block_size = pool.shape[4]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    # Advanced indices apart from each other put their dimension first: [T, kv_heads, head_dim].
    pool[block, :, layer, 0, offset] = key
    pool[block, :, layer, 1, offset] = value


def gather_kv(
    pool: torch.Tensor, layer: int, blocks: torch.Tensor, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's keys and values as `[kv_heads, context, head_dim]` each, copied out of its blocks."""
    pages = pool[:, :, layer].index_select(0, blocks)  # [blocks, kv_heads, 2, block_size, head_dim]
    heads_first = pages.permute(2, 1, 0, 3, 4).flatten(2, 3)  # [2, kv_heads, blocks * block_size, head_dim]
    return heads_first[0, :, :context], heads_first[1, :, :context]


def extend_attention(
    query: torch.Tensor, pool: torch.Tensor, layer: int, ragged: Ragged, scale: float
) -> torch.Tensor:
    """Causal attention of a ragged batch over its paged context. `query[T, H, head_dim]` -> the same shape.

    Prefill, a chunk after a prefix, and a decode step (length 1) are all this one.
    """
    out = torch.empty_like(query)
    kv_heads = pool.shape[1]
    for place, context, blocks in ragged.rows(pool.shape[4]):
        key, value = gather_kv(pool, layer, blocks, context)
        length = place.stop - place.start
        # [kv_heads, group, length, head_dim]: the query heads of one KV head together.
        grouped = query[place].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        if length == 1:
            # One token sees its whole context: no mask, and its group takes the place of the length.
            attended = F.scaled_dot_product_attention(grouped.squeeze(2), key, value, scale=scale).unsqueeze(2)
        else:
            shape = (kv_heads, grouped.shape[1], context, key.shape[-1])
            key, value = key.unsqueeze(1).expand(shape), value.unsqueeze(1).expand(shape)
            mask = causal_mask(length, context, query.device)
            attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        out[place] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def causal_mask(length: int, context: int, device: torch.device) -> torch.Tensor:
    """bool `[length, context]`: the last `length` positions of `context`, each seeing itself and what is before."""
    return torch.ones(length, context, dtype=torch.bool, device=device).tril(context - length)


@dataclass(frozen=True, slots=True)
class ReferenceAttention:
    """One step's attention by the functions above, on any device."""

    pool: torch.Tensor
    ragged: Ragged
    slot_mapping: torch.Tensor

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        kv_write(self.pool, layer, self.slot_mapping, key, value)

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        return extend_attention(query, self.pool, layer, self.ragged, scale)


def copy_blocks(pool: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copy whole blocks inside the pool: `pairs` int64 `[C, 2]` on the CPU, from and to. All are read before any is
    written; no block is written twice."""
    pairs = pairs.to(pool.device)
    pool[pairs[:, 1]] = pool[pairs[:, 0]]
