"""The CPU's linear layers against torch's own."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from kvferry.kernels.few_rows import MOST_ROWS
from kvferry.kernels.packed_linear import PackedLinear, can_pack, pack_linears

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, MOST_ROWS - 1, MOST_ROWS, MOST_ROWS + 1, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 128), (96, 48), (96, 131), (96, 1), (100, 7), (3, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(dtype, rows, inputs, outputs, bias):
    assert can_pack(CPU, dtype), "these tests are meant to run where oneDNN is"
    torch.manual_seed(rows)
    plain = torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    ours = PackedLinear(plain.weight, plain.bias)
    bound = 1e-4 if dtype is torch.float32 else 5e-2
    for x in (torch.randn(2, rows, inputs, dtype=dtype), torch.randn(rows, 2, inputs, dtype=dtype).transpose(0, 1)[:1]):
        torch.testing.assert_close(ours(x), plain(x), rtol=bound, atol=bound)


def test_what_can_be_packed():
    assert can_pack(CPU, torch.float32)
    assert can_pack(CPU, torch.float16)
    assert not can_pack(CPU, torch.float64)
    assert not can_pack(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_weight_is_not_copied(dtype):
    weight = torch.nn.Parameter(torch.zeros(64, 8, dtype=dtype))
    assert PackedLinear(weight, None).weight.data_ptr() == weight.data_ptr()


def test_a_bf16_weight_where_onednn_does_not_multiply_it(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(48, 96, dtype=torch.bfloat16))
    ours, x = PackedLinear(weight, None), torch.randn(5, 96, dtype=torch.bfloat16)
    assert ours.weight.data_ptr() == weight.data_ptr()
    torch.testing.assert_close(ours(x), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("place", ["weight", "x"])
def test_nan_is_told(place):
    """In the outputs it reaches, and in no other."""
    weight, x = torch.ones(40, 32), torch.ones(9, 32)
    (weight if place == "weight" else x)[3, 17] = torch.nan
    seen = PackedLinear(weight, None)(x).isnan()
    own = seen[:, 3] if place == "weight" else seen[3]
    assert own.all()
    assert seen.sum() == len(own)


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
