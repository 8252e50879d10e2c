"""Attention of rows of one token each, on the CPU: whatever all layers share is prepared once a step, so that a layer
costs a few operators a group.

A group's keys are gathered into a buffer that stays in the cores' caches, are read from there, and then its values, by
way of the same buffer. The query heads of one KV head are the rows of a product, so each is read once.
"""

from dataclasses import dataclass

import torch

from kvferry.kernels.reference import Scoring
from kvferry.kernels.row_groups import DecodeGroup, DecodeRows
from kvferry.kernels.workspace import Workspace, tiles_of_layer


@dataclass(frozen=True, slots=True)
class Prepared:
    """One group and its views of the workspace; `N` is rows * kv_heads.

    `gathered [N * pages, block_size * head_dim]` is what tiles are copied to; `widened`, if they are to be, the same in
    fp32. `vectors [N * pages * block_size, head_dim]` and `kv [N, width, head_dim]` are views of that. `seen` is
    `scores` without the sinks' column, as `seen_weights` is of `weights`, `[N, group, width]`. `hidden_scores` and
    `hidden_vectors` are the places of what a row does not see in `scores` and `vectors`.
    """

    place: slice
    tiles: torch.Tensor
    gathered: torch.Tensor
    widened: torch.Tensor | None
    vectors: torch.Tensor
    kv: torch.Tensor
    scores: torch.Tensor
    seen: torch.Tensor
    weights: torch.Tensor
    seen_weights: torch.Tensor
    hidden_scores: torch.Tensor | None
    hidden_vectors: torch.Tensor | None


class CpuDecode:
    """The rows of one token of a step, as layers with one window and with or without sinks see them. Scores are fp32 at
    least."""

    def __init__(
        self, pool: torch.Tensor, workspace: Workspace, rows: DecodeRows, heads: int, dtype: torch.dtype, sinks: bool
    ):
        self._pool, self._tokens = pool, rows.tokens
        self._dtype = torch.promote_types(dtype, torch.float32)
        self._groups = [self._prepare(group, workspace, heads, int(sinks)) for group in rows.groups]

    def _prepare(self, group: DecodeGroup, workspace: Workspace, heads: int, sinks: int) -> Prepared:
        _, kv_heads, _, _, block_size, head_dim = self._pool.shape
        items, length = (group.stop - group.start) * kv_heads, group.pages * block_size
        gathered = workspace.take("gathered", (items * group.pages, block_size * head_dim), self._pool.dtype)
        widened = None
        if self._dtype is not self._pool.dtype:
            widened = workspace.take("gathered", gathered.shape, self._dtype)
        vectors = (gathered if widened is None else widened).view(-1, head_dim)
        columns = group.width + sinks
        scores, weights = (
            workspace.take(name, (items, heads // kv_heads, columns), self._dtype) for name in ("scores", "weights")
        )
        hidden_scores = hidden_vectors = None
        if group.hidden is not None:
            row, position = group.hidden
            hidden_scores = ((row[:, None] * heads + torch.arange(heads)) * columns + position[:, None]).view(-1)
            hidden_vectors = ((row[:, None] * kv_heads + torch.arange(kv_heads)) * length + position[:, None]).view(-1)
        return Prepared(
            place=slice(group.start, group.stop),
            tiles=group.tiles,
            gathered=gathered,
            widened=widened,
            vectors=vectors,
            kv=vectors.view(items, length, head_dim)[:, : group.width],
            scores=scores,
            seen=scores[..., : group.width],
            weights=weights,
            seen_weights=weights[..., : group.width],
            hidden_scores=hidden_scores,
            hidden_vectors=hidden_vectors,
        )

    def attend(self, layer: int, query: torch.Tensor, scoring: Scoring, out: torch.Tensor) -> None:
        """From `query` to `out`, both `[T, H, head_dim]`: the rows of one token of them."""
        kv_heads, head_dim = self._pool.shape[1], self._pool.shape[5]
        softcap, sinks = scoring.softcap, scoring.sinks
        asked = query.index_select(0, self._tokens).to(self._dtype).mul_(scoring.scale)
        attended = torch.empty_like(asked)
        keys, values = tiles_of_layer(self._pool, layer)
        for group in self._groups:
            per_head = (len(group.kv), -1, head_dim)
            self._gather(keys, group)
            torch.bmm(asked[group.place].view(per_head), group.kv.transpose(1, 2), out=group.seen)
            if softcap is not None:
                group.seen.div_(softcap).tanh_().mul_(softcap)
            if group.hidden_scores is not None:
                group.scores.view(-1).index_fill_(0, group.hidden_scores, -torch.inf)
            if sinks is not None:
                group.scores[..., -1].unflatten(0, (-1, kv_heads)).copy_(sinks.view(kv_heads, -1))
            torch.softmax(group.scores, -1, out=group.weights)
            self._gather(values, group)
            if group.hidden_vectors is not None:  # a weight of 0 does not make NaN nothing
                group.vectors.index_fill_(0, group.hidden_vectors, 0)
            torch.bmm(group.seen_weights, group.kv, out=attended[group.place].view(per_head))
        out.index_copy_(0, self._tokens, attended.to(query.dtype))

    def _gather(self, tiles: torch.Tensor, group: Prepared) -> None:
        torch.index_select(tiles, 0, group.tiles, out=group.gathered)
        if group.widened is not None:
            group.widened.copy_(group.gathered)
