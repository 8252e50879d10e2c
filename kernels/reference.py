"""Plain torch on a paged KV pool: the truth that other kernels are held to, and the path where there is none.

Shapes used here: `pool[num_blocks, kv_heads, layers, 2, block_size, head_dim]`; `T` new tokens of all rows laid end to
end; `H` query heads, `H = kv_heads * group`. A row's tokens sit at positions `context - length .. context - 1`, and
their keys and values are in the pool already (write first, then attend).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


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


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer weighs what its tokens see.

    Scores are products times `scale`. With `window`, the token at position i sees only positions j with
    `0 <= i - j < window`. With `softcap`, a score s becomes `softcap * tanh(s / softcap)` after scaling (Gemma 2).
    `sinks[H]` is one more logit a head in the softmax, to which no value belongs (GPT-OSS).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


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


def gather_kv(pool: torch.Tensor, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some blocks in a row, `[kv_heads, len(blocks) * block_size, head_dim]` each, copied out."""
    pages = pool[:, :, layer].index_select(0, blocks)  # [blocks, kv_heads, 2, block_size, head_dim]
    heads_first = pages.permute(2, 1, 0, 3, 4).flatten(2, 3)  # [2, kv_heads, blocks * block_size, head_dim]
    return heads_first[0], heads_first[1]


def extend_attention(
    query: torch.Tensor, pool: torch.Tensor, layer: int, ragged: Ragged, scoring: Scoring
) -> torch.Tensor:
    """Causal attention of a ragged batch over its paged context. `query[T, H, head_dim]` -> the same shape.

    Prefill, a chunk after a prefix, and a decode step (length 1) are all this one. Blocks that no token of a row sees
    are not read. Scores and sums are at least fp32.
    """
    window, softcap, sinks = scoring.window, scoring.softcap, scoring.sinks
    out = torch.empty_like(query)
    kv_heads, block_size = pool.shape[1], pool.shape[4]
    wide = torch.promote_types(query.dtype, torch.float32)
    for place, context, blocks in ragged.rows(block_size):
        length = place.stop - place.start
        skipped = first_seen(context - length, window) // block_size  # blocks
        key, value = (
            kv[:, : context - skipped * block_size].to(wide) for kv in gather_kv(pool, layer, blocks[skipped:])
        )
        # [kv_heads, group, length, head_dim]: the query heads of one KV head together.
        grouped = query[place].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).to(wide)
        scores = torch.matmul(grouped, key.unsqueeze(1).transpose(-1, -2)) * scoring.scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(~visible(length, key.shape[1], window, query.device), -torch.inf)
        if sinks is not None:
            column = sinks.to(wide).view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(-1)[..., : key.shape[1]]
        attended = torch.matmul(weights, value.unsqueeze(1))
        out[place] = attended.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return out


def first_seen(position: int, window: int | None) -> int:
    """The first position that the token at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def visible(length: int, context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool `[length, context]`: the last `length` of `context` positions, each seeing itself and the `window - 1`
    positions before it, or all."""
    seen = torch.ones(length, context, dtype=torch.bool, device=device).tril(context - length)
    return seen if window is None else seen.triu(context - length - window + 1)


@dataclass(frozen=True, slots=True)
class ReferenceAttention:
    """One step's attention by the functions above, on any device."""

    pool: torch.Tensor
    ragged: Ragged
    slot_mapping: torch.Tensor

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        kv_write(self.pool, layer, self.slot_mapping, key, value)

    def attend(self, layer: int, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        return extend_attention(query, self.pool, layer, self.ragged, scoring)


def copy_blocks(pool: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copy whole blocks inside the pool: `pairs` int64 `[C, 2]` on the CPU, from and to. All are read before any is
    written; no block is written twice."""
    pairs = pairs.to(pool.device)
    pool[pairs[:, 1]] = pool[pairs[:, 0]]
