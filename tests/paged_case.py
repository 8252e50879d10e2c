"""Ragged batches over paged KV, drawn by Hypothesis, and attention over them written out as sums in float64."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from kvferry.kernels.reference import RowSpan, kv_write

LAYERS = 2


@dataclass(frozen=True)
class Case:
    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    rows: tuple[tuple[int, int], ...]  # cached, new
    seed: int


CASES = st.builds(
    Case,
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4]),
    head_dim=st.sampled_from([1, 4, 5, 16]),
    block_size=st.sampled_from([1, 2, 4, 16]),
    rows=st.lists(st.tuples(st.integers(0, 35), st.integers(1, 20)), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**16),
)


class Paged:
    """A case's keys and values, dense and in a pool that holds NaN elsewhere; blocks in random order."""

    def __init__(self, case: Case, layer: int):
        self.case, self.layer = case, layer
        self.generator = torch.Generator().manual_seed(case.seed)
        contexts = [cached + new for cached, new in case.rows]
        pages = [-(-context // case.block_size) for context in contexts]
        shape = (sum(pages) + 2, case.kv_heads, LAYERS, 2, case.block_size, case.head_dim)
        self.pool = torch.full(shape, float("nan"), dtype=torch.float64)
        order = torch.randperm(len(self.pool), generator=self.generator)
        self.tables = list(order[: sum(pages)].split(pages))
        self.keys = [self.random(context, case.kv_heads) for context in contexts]
        self.values = [self.random(context, case.kv_heads) for context in contexts]
        starts = [sum(new for _, new in case.rows[:i]) for i in range(len(case.rows))]
        self.rows = [
            RowSpan(start, new, cached + new, table)
            for start, (cached, new), table in zip(starts, case.rows, self.tables, strict=True)
        ]
        self.query = self.random(sum(new for _, new in case.rows), case.kv_heads * case.group)

    def random(self, tokens: int, heads: int) -> torch.Tensor:
        shape = (tokens, heads, self.case.head_dim)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def slots(self, row: int) -> torch.Tensor:
        positions = torch.arange(len(self.keys[row]))
        size = self.case.block_size
        return self.tables[row][positions // size] * size + positions % size

    def write(self) -> None:
        """All sequences at once, in one ragged call."""
        slots = torch.cat([self.slots(i) for i in range(len(self.rows))])
        kv_write(self.pool, self.layer, slots, torch.cat(self.keys), torch.cat(self.values))

    def attended(self, scale: float) -> torch.Tensor:
        """softmax(q k^T scale) v over the tokens up to and with each one's own position."""
        out = torch.empty_like(self.query)
        for i, row in enumerate(self.rows):
            for token in range(row.length):
                seen = row.context - row.length + token + 1
                for head in range(self.query.shape[1]):
                    key, value = (kv[i][:seen, head // self.case.group] for kv in (self.keys, self.values))
                    weights = [math.exp(w) for w in (key @ self.query[row.start + token, head] * scale).tolist()]
                    weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)
                    out[row.start + token, head] = weights @ value
        return out
