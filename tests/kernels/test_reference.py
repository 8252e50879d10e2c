"""The plain torch kernels against attention written out as sums, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import CASES, LAYERS, Case, Paged

from kvferry.kernels.reference import extend_attention, gather_kv


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
