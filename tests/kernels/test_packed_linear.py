"""The CPU's linear layers against torch's own."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from kvferry.kernels.few_rows import MOST_ROWS
from kvferry.kernels.packed_linear import PackedLinear, can_pack, pack_linears

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, MOST_ROWS - 1, MOST_ROWS, MOST_ROWS + 1, 300])
@pytest.mark.parametrize("outputs", [128, 96, 48, 131, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(dtype, rows, outputs, bias):
    assert can_pack(CPU, dtype), "these tests are meant to run where oneDNN is"
    torch.manual_seed(rows)
    plain = torch.nn.Linear(96, outputs, bias=bias, dtype=dtype)
    ours = PackedLinear(plain.weight, plain.bias)
    bound = 1e-4 if dtype is torch.float32 else 5e-2
    for x in (torch.randn(2, rows, 96, dtype=dtype), torch.randn(rows, 2, 96, dtype=dtype).transpose(0, 1)[:1]):
        torch.testing.assert_close(ours(x), plain(x), rtol=bound, atol=bound)


def test_what_can_be_packed():
    assert can_pack(CPU, torch.float32)
    assert not can_pack(CPU, torch.float16)
    assert not can_pack(torch.device("cuda"), torch.float32)


def test_an_fp32_weight_is_not_copied():
    weight = torch.nn.Parameter(torch.zeros(64, 8))
    assert PackedLinear(weight, None).weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_a_model_replaces_both_kinds_of_linear(dtype):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"in": torch.nn.Linear(16, 32), "deep": torch.nn.ModuleList([Conv1D(64, 32)])})
    model = model.to(dtype)
    x = torch.randn(5, 16, dtype=dtype)
    before = model["deep"][0](model["in"](x))
    with torch.inference_mode():
        pack_linears(model)
        assert {type(m) for m in (model["in"], model["deep"][0])} == {PackedLinear}
        bound = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(model["deep"][0](model["in"](x)), before, rtol=bound, atol=bound)
