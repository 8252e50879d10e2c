"""The CPU's attention against its plain twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import CASES, DECODE_CASES, LAYERS, Case, Paged
from torch.profiler import ProfilerActivity, profile

from kvferry.kernels import cpu_attention
from kvferry.kernels.cpu_attention import CpuAttention
from kvferry.kernels.decode_kernel import PIECE
from kvferry.kernels.reference import Ragged, Scoring, extend_attention
from kvferry.kernels.workspace import Workspace


def on_cpu(paged: Paged, dtype: torch.dtype, workspace: Workspace) -> CpuAttention:
    """A step that has written the whole of every sequence and attends from its last tokens."""
    paged.pool = paged.pool.to(dtype)
    attention = CpuAttention(paged.pool, workspace, paged.ragged, paged.slots())
    attention.write(paged.layer, torch.cat(paged.keys).to(dtype), torch.cat(paged.values).to(dtype))
    return attention


@settings(max_examples=200, deadline=None)
@given(
    case=st.one_of(CASES, DECODE_CASES),
    layer=st.integers(0, LAYERS - 1),
    sizes=st.sampled_from([(1, 1), (3, 40), (256, 2**24)]),
)
def test_attention_is_the_sum_written_out(case, layer, sizes):
    """Whatever is done at once: `sizes` are the module's own limits, small ones split groups and rows."""
    paged = Paged(case, layer)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("PIECE", "MOST_SCORES"), sizes, strict=True):
            patch.setattr(cpu_attention, name, size)
        attention = on_cpu(paged, torch.float32, Workspace())
        assert (~paged.pool.isnan()).sum() == 2 * case.kv_heads * case.head_dim * sum(paged.contexts)
        paged.lose_what_is_not_seen()
        got = attention.attend(layer, paged.query.float(), Scoring(0.3, *paged.told()))
    torch.testing.assert_close(got.double(), paged.attended(0.3), rtol=1e-4, atol=1e-5)


def test_a_whole_prompt_is_not_read_back():
    """Its keys and values are attended to as they came; rows with a prefix beside it read their pages."""
    paged = Paged(Case(2, 2, 16, 4, ((0, 9), (0, 1), (0, 5)), seed=6), 1)
    attention = on_cpu(paged, torch.float32, Workspace())
    paged.pool[paged.tables[0]] = paged.pool[paged.tables[2]] = torch.nan
    got = attention.attend(1, paged.query.float(), Scoring(0.3))
    torch.testing.assert_close(got.double(), paged.attended(0.3), rtol=1e-4, atol=1e-5)
    other = attention.attend(2, paged.query.float(), Scoring(0.3))
    assert other[0].isnan().all(), "another layer's were not written now"


@pytest.mark.parametrize("features", [{}, {"window": 6}, {"window": 6, "softcap": 0.7, "sinks": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_as_good_as_the_twin(dtype, features):
    paged = Paged(Case(2, 2, 16, 4, ((0, 9), (20, 1), (13, 6), (20, 1), (3, 1)), seed=3, **features), 0)
    attention = on_cpu(paged, dtype, Workspace())
    query, told = paged.query.to(dtype), paged.told()
    twin = extend_attention(query, paged.pool, 0, paged.ragged, Scoring(0.25, *told))
    got = attention.attend(0, query, Scoring(0.25, *told))
    assert got.dtype is dtype
    bound = 1e-10 if dtype is torch.float64 else 2e-2
    torch.testing.assert_close(got, twin, rtol=bound, atol=bound)


@pytest.mark.parametrize("window", [None, 3, 512, 700])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_long_rows_are_read_in_pieces(window, threads):
    """Some end with a piece, some a token before or after; by more threads than there is work, too."""
    rows = tuple((PIECE * times + more, 1) for times in (0, 1, 3) for more in (-1, 0, 1, 100) if times or more > 0)
    paged = Paged(Case(2, 3, 8, 16, rows, seed=7, window=window, softcap=3.0, sinks=True), 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        attention = on_cpu(paged, torch.float32, Workspace())
        paged.lose_what_is_not_seen()
        got = attention.attend(2, paged.query.float(), Scoring(0.3, *paged.told()))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got.double(), paged.attended(0.3), rtol=1e-4, atol=1e-5)


def test_a_row_is_what_it_is_alone():
    """To the last bit: nobody's answer depends on who else is there, nor on the threads."""
    rows = ((900, 1), (3, 1), (1100, 1), (511, 1))
    paged = Paged(Case(2, 2, 16, 16, rows, seed=8), 0)
    together = on_cpu(paged, torch.float32, Workspace()).attend(0, paged.query.float(), Scoring(0.25))
    for i in range(len(rows)):
        one = Ragged(
            torch.tensor([0]), torch.tensor([1]), paged.ragged.contexts[i : i + 1], paged.ragged.tables[i : i + 1]
        )
        slots = torch.tensor([0])
        alone = CpuAttention(paged.pool, Workspace(), one, slots).attend(
            0, paged.query[i : i + 1].float(), Scoring(0.25)
        )
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("place", ["query", "keys", "values"])
def test_nan_is_told(place):
    """A row that is broken is seen to be, and breaks no other."""
    paged = Paged(Case(2, 2, 16, 16, ((700, 1), (600, 1), (20, 1)), seed=9), 0)
    if place == "query":
        paged.query[1] = torch.nan
    else:
        getattr(paged, place)[1][444] = torch.nan
    got = on_cpu(paged, torch.float32, Workspace()).attend(0, paged.query.float(), Scoring(0.25))
    assert got[1].isnan().all()
    assert not got[0].isnan().any()
    assert not got[2].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_are_not_rounded_before_they_are_used(dtype):
    """Scores are exact: a scale that is no power of two would be rounded in with the query's dtype."""
    paged = Paged(Case(2, 2, 128, 16, ((300, 1), (40, 1)), seed=5), 0)
    attention, query = on_cpu(paged, dtype, Workspace()), 4 * paged.query.to(dtype)
    exact = extend_attention(query.float(), paged.pool.float(), 0, paged.ragged, Scoring(128**-0.5))
    got = attention.attend(0, query, Scoring(128**-0.5)).float()
    assert (got - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_layers_of_one_step_may_differ():
    """Windows and softcaps alternate in Gemma; what is prepared for one layer serves the next of its kind only."""
    paged = Paged(Case(2, 2, 16, 4, ((0, 9), (20, 1), (13, 6), (9, 1)), seed=4), 1)
    attention = on_cpu(paged, torch.float32, Workspace())
    query = paged.query.float()
    for told in ((5, None), (None, None), (5, 2.0), (None, 2.0), (5, None), (1000, None)):
        twin = extend_attention(query, paged.pool, 1, paged.ragged, Scoring(0.25, *told))
        torch.testing.assert_close(attention.attend(1, query, Scoring(0.25, *told)), twin, rtol=1e-5, atol=1e-5)


def test_a_buffer_is_kept():
    """From step to step, however sizes change, a buffer is only replaced by a larger one."""
    workspace = Workspace()

    def place(count: int, name: str = "a", dtype: torch.dtype = torch.float32) -> int:
        taken = workspace.take(name, (count, 8), dtype)
        assert taken.shape == (count, 8)
        assert taken.dtype is dtype
        return taken.data_ptr()

    first = place(10)
    assert place(4) == first
    assert len({first, place(10, "b"), place(10, dtype=torch.bfloat16)}) == 3
    larger = place(11)
    assert place(20) == larger, "it grows by doubling"


@pytest.mark.parametrize("features", [{}, {"window": 600, "softcap": 9.0, "sinks": True}], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_steady_decode_step_takes_no_memory_that_grows_with_the_context(dtype, features):
    """What torch's allocator was asked for, in all, by the attention of one step, at two contexts."""

    def taken(context: int) -> tuple[int, int]:
        rows = tuple((context + i, 1) for i in range(3))
        paged = Paged(Case(2, 2, 16, 16, rows, seed=1, **features), 0)
        workspace = Workspace()
        on_cpu(paged, dtype, workspace).attend(0, paged.query.to(dtype), Scoring(0.25, *paged.told()))
        attention = on_cpu(paged, dtype, workspace)
        attention.attend(0, paged.query.to(dtype), Scoring(0.25, *paged.told()))  # lists the tiles, once a step
        query, told = paged.query.to(dtype), paged.told()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            attention.attend(1, query, Scoring(0.25, *told))
        sizes = [e.self_cpu_memory_usage for e in seen.events() if e.self_cpu_memory_usage > 0]
        return sum(sizes), 2 * sum(paged.contexts) * 2 * 16 * dtype.itemsize

    (short, _), (long, kv_bytes) = taken(70), taken(1000)
    assert short > 0, "the profiler sees what is allocated"
    assert long <= short + 1024
    assert kv_bytes > 50 * long, "the comparison is sharp: copying the KV afresh would be seen"
