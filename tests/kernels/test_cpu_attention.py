"""The CPU's attention and its packed linear layers against their plain twins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import CASES, DECODE_CASES, LAYERS, Case, Paged
from transformers.pytorch_utils import Conv1D

from kvferry.kernels import cpu_attention
from kvferry.kernels.cpu_attention import CpuAttention, Workspace
from kvferry.kernels.packed_linear import PackedLinear, can_pack, pack_linears
from kvferry.kernels.reference import extend_attention

CPU = torch.device("cpu")


def on_cpu(paged: Paged, dtype: torch.dtype, workspace: Workspace) -> CpuAttention:
    """A step that has written the whole of every sequence and attends from its last tokens."""
    paged.pool = paged.pool.to(dtype)
    attention = CpuAttention(paged.pool, workspace, paged.ragged, paged.slots())
    attention.write(paged.layer, torch.cat(paged.keys).to(dtype), torch.cat(paged.values).to(dtype))
    return attention


@settings(max_examples=150, deadline=None)
@given(
    case=st.one_of(CASES, DECODE_CASES),
    layer=st.integers(0, LAYERS - 1),
    group_bytes=st.sampled_from([1, 500, 2**20]),
)
def test_attention_is_the_sum_written_out(case, layer, group_bytes):
    paged = Paged(case, layer)
    before, cpu_attention.GROUP_BYTES = cpu_attention.GROUP_BYTES, group_bytes
    try:
        attention = on_cpu(paged, torch.float32, Workspace())
    finally:
        cpu_attention.GROUP_BYTES = before
    assert (~paged.pool.isnan()).sum() == 2 * case.kv_heads * case.head_dim * sum(paged.contexts)
    paged.lose_what_is_not_seen()
    got = attention.attend(layer, paged.query.float(), 0.3, *paged.told())
    torch.testing.assert_close(got.double(), paged.attended(0.3), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_good_as_its_twin():
    paged = Paged(Case(2, 2, 16, 4, ((0, 9), (20, 1), (13, 6), (20, 1)), seed=3), 0)
    attention = on_cpu(paged, torch.bfloat16, Workspace())
    query = paged.query.bfloat16()
    twin = extend_attention(query, paged.pool, 0, paged.ragged, 0.25)
    torch.testing.assert_close(attention.attend(0, query, 0.25), twin, rtol=3e-2, atol=3e-2)


def test_the_gather_buffer_is_kept():
    """From step to step, however sizes change, a buffer is only replaced by a larger one."""
    workspace, like = Workspace(), torch.zeros(1, 8)
    first = workspace.tiles(10, like).data_ptr()
    assert workspace.tiles(4, like).data_ptr() == first
    larger = workspace.tiles(11, like).data_ptr()
    assert workspace.tiles(20, like).data_ptr() == larger, "it grows by doubling"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 33, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear(dtype, rows, bias):
    assert can_pack(CPU, dtype), "these tests are meant to run where oneDNN is"
    torch.manual_seed(rows)
    plain = torch.nn.Linear(96, 130, bias=bias, dtype=dtype)
    x = torch.randn(2, rows, 96, dtype=dtype)
    packed = PackedLinear(plain.weight, plain.bias)
    bound = 1e-4 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(packed(x), plain(x), rtol=bound, atol=bound)


def test_packing_a_model_replaces_both_kinds_of_linear():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"in": torch.nn.Linear(16, 32), "deep": torch.nn.ModuleList([Conv1D(24, 32)])})
    x = torch.randn(3, 16)
    before = model["deep"][0](model["in"](x))
    with torch.inference_mode():
        pack_linears(model)
        assert {type(m).__name__ for m in (model["in"], model["deep"][0])} == {"PackedLinear"}
        torch.testing.assert_close(model["deep"][0](model["in"](x)), before)
