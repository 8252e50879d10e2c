"""The plain torch kernels against attention written out as sums, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import CASES, DECODE_CASES, LAYERS, Case, Paged
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from kvferry.kernels.reference import Scoring, copy_blocks, extend_attention, gather_kv, kv_write, visible

FEATURES = {"window": 6, "softcap": 0.7, "sinks": True}


@settings(max_examples=80, deadline=None)
@given(
    case=st.one_of(CASES, DECODE_CASES),
    layer=st.integers(0, LAYERS - 1),
    scale=st.sampled_from([1.0, 0.25, 0.6]),
)
def test_attention(case, layer, scale):
    paged = Paged(case, layer)
    paged.write()
    got = extend_attention(paged.query, paged.pool, layer, paged.ragged, Scoring(scale, *paged.told()))
    torch.testing.assert_close(got, paged.attended(scale), rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(case=CASES, layer=st.integers(0, LAYERS - 1))
def test_what_is_written_is_gathered_and_nothing_else_is_touched(case, layer):
    paged = Paged(replace(case, window=None), layer)
    paged.write()
    for row, (place, context, blocks) in enumerate(paged.ragged.rows(case.block_size)):
        assert place == slice(paged.starts[row], paged.starts[row] + paged.lengths[row])
        got_key, got_value = gather_kv(paged.pool, layer, blocks)
        assert torch.equal(got_key[:, :context], paged.keys[row].transpose(0, 1))
        assert torch.equal(got_value[:, :context], paged.values[row].transpose(0, 1))
    written = 2 * case.kv_heads * case.head_dim * sum(paged.contexts)
    assert (~paged.pool.isnan()).sum() == written


def test_a_write_goes_to_its_slot():
    """Block, head, layer, K or V, offset: each named by hand."""
    pool = torch.zeros(3, 2, 2, 2, 4, 1)
    key, value = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[[5.0], [6.0]], [[7.0], [8.0]]])
    kv_write(pool, 1, torch.tensor([2 * 4 + 3, 0 * 4 + 1]), key, value)
    assert pool[2, :, 1, 0, 3, 0].tolist() == [1, 2]
    assert pool[2, :, 1, 1, 3, 0].tolist() == [5, 6]
    assert pool[0, :, 1, 0, 1, 0].tolist() == [3, 4]
    assert pool[0, :, 1, 1, 1, 0].tolist() == [7, 8]
    assert pool.count_nonzero() == 8


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=6, unique_by=lambda pair: pair[1]),
    strided=st.booleans(),
)
def test_copied_blocks_are_all_read_before_any_is_written(pairs, strided):
    pool = torch.arange(8.0 * 2 * 3 * 2 * 2 * 4).view(8, 2, 3, 2, 2, 4)
    pool = pool.transpose(1, 2) if strided else pool
    want = pool.clone()
    for source, target in pairs:
        want[target] = pool[source]
    copy_blocks(pool, torch.tensor(pairs, dtype=torch.int64).view(-1, 2))
    assert torch.equal(pool, want)


@pytest.mark.parametrize("features", [{}, FEATURES], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype, features):
    case = Case(2, 2, 16, 4, ((0, 9), (20, 1), (13, 6)), seed=3, **features)
    paged = Paged(case, 0)
    paged.write()
    window, softcap, sinks = paged.told()
    sinks = None if sinks is None else sinks.to(dtype)
    got = extend_attention(
        paged.query.to(dtype), paged.pool.to(dtype), 0, paged.ragged, Scoring(0.25, window, softcap, sinks)
    )
    assert got.dtype == dtype
    bound = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), paged.attended(0.25), rtol=bound, atol=bound)


def test_sinks_are_those_of_gpt_oss():
    paged = Paged(Case(2, 3, 8, 4, ((0, 9),), seed=5, window=4, sinks=True), 1)
    paged.write()

    class Module:
        num_key_value_groups, sinks, training = 3, paged.sinks, False

    mask = torch.zeros(9, 9).masked_fill(~visible(9, 9, 4, torch.device("cpu")), -math.inf)
    q, k, v = (x.transpose(0, 1)[None] for x in (paged.query, paged.keys[0], paged.values[0]))
    theirs, _ = eager_attention_forward(Module(), q, k, v, mask, 0.4)
    ours = extend_attention(paged.query, paged.pool, 1, paged.ragged, Scoring(0.4, *paged.told()))
    torch.testing.assert_close(ours, theirs[0])


@pytest.mark.parametrize("window", [1, 2, 5, 30])
def test_visible_positions(window):
    """The last 7 of 11 positions, by the definition."""
    got = visible(7, 11, window, torch.device("cpu"))
    want = [[0 <= i - j < window for j in range(11)] for i in range(4, 11)]
    assert got.tolist() == want


def test_a_wrong_group_scale_or_feature_would_be_seen():
    """The comparison is sharp: heads grouped the other way round, another scale, window or cap, and a sink on the
    wrong head are far off."""
    paged = Paged(Case(2, 2, 8, 4, ((5, 4),), seed=1, **FEATURES), 0)
    paged.write()
    right, window, softcap, sinks = paged.attended(0.3), *paged.told()
    regrouped = paged.query.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
    for query, *told in (
        (regrouped, 0.3, window, softcap, sinks),
        (paged.query, 0.35, window, softcap, sinks),
        (paged.query, 0.3, window - 1, softcap, sinks),
        (paged.query, 0.3, window, 2 * softcap, sinks),
        (paged.query, 0.3, window, softcap, sinks.flip(0)),
        (paged.query, 0.3, window, softcap, None),
    ):
        assert not torch.allclose(
            extend_attention(query, paged.pool, 0, paged.ragged, Scoring(*told)), right, atol=1e-3
        )
