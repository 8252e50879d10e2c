"""The plain torch kernels against attention written out as sums, in float64."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.kernels.reference import RowSpan, extend_attention, gather_kv, kv_write

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


@settings(max_examples=40, deadline=None)
@given(case=CASES, layer=st.integers(0, LAYERS - 1), scale=st.sampled_from([1.0, 0.25, 0.6]))
def test_attention(case, layer, scale):
    paged = Paged(case, layer)
    paged.write()
    got = extend_attention(paged.query, paged.pool, layer, paged.rows, scale)
    torch.testing.assert_close(got, paged.attended(scale), rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(case=CASES, layer=st.integers(0, LAYERS - 1))
def test_what_is_written_is_gathered_and_nothing_else_is_touched(case, layer):
    paged = Paged(case, layer)
    paged.write()
    for row, key, value in zip(paged.rows, paged.keys, paged.values, strict=True):
        got_key, got_value = gather_kv(paged.pool, layer, row)
        assert torch.equal(got_key, key.transpose(0, 1))
        assert torch.equal(got_value, value.transpose(0, 1))
    written = 2 * case.kv_heads * case.head_dim * sum(row.context for row in paged.rows)
    assert (~paged.pool.isnan()).sum() == written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    case = Case(2, 2, 16, 4, ((0, 9), (20, 1), (13, 6)), seed=3)
    paged = Paged(case, 0)
    paged.write()
    got = extend_attention(paged.query.to(dtype), paged.pool.to(dtype), 0, paged.rows, 0.25)
    assert got.dtype == dtype
    bound = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), paged.attended(0.25), rtol=bound, atol=bound)


def test_a_wrong_group_or_scale_would_be_seen():
    """The comparison is sharp: heads grouped the other way round, or another scale, are far off."""
    paged = Paged(Case(2, 2, 8, 4, ((5, 4),), seed=1), 0)
    paged.write()
    right = paged.attended(0.3)
    regrouped = paged.query.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
    for query, scale in ((regrouped, 0.3), (paged.query, 0.35)):
        assert not torch.allclose(extend_attention(query, paged.pool, 0, paged.rows, scale), right, atol=1e-3)
