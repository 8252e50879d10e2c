"""Linear layers on the CPU for the few rows of a decode step, where reading the weights is all the work.

bf16: weights laid out for oneDNN once, at load, by the two operators that torch's inductor uses for that ("freezing"),
called directly. fp32: the weights stay as they are; few rows go through a kernel of our own, of which `F.linear` takes
twice the time and more. bench/engine.py measures what they give together.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kvferry.kernels.few_rows import can_take, few_rows


class PackedLinear(nn.Module):
    """`x[..., inputs]` -> `[..., outputs]`, as the nn.Linear whose weight `[outputs, inputs]` and bias it was given. In
    fp32 it shares their memory."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach()
        if weight.dtype is not torch.float32:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        rows = x.numel() // self.in_features
        if not can_take(rows, self.in_features):
            return F.linear(x, self.weight, self.bias)
        out = few_rows(x.reshape(rows, -1).contiguous(), self.weight).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out.add_(self.bias)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a layer of ours for this device and dtype, in this torch and on this machine."""
    if device.type != "cpu" or dtype is torch.float32:
        return device.type == "cpu"
    return (
        dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linears(module: nn.Module) -> None:
    """Replace every nn.Linear below `module`, and transformers' Conv1D (GPT-2's transposed linear), in place. Plain
    weights that were copied are let go unless something else (a tied embedding) uses them."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child.weight, child.bias))
        elif type(child).__name__ == "Conv1D" and getattr(child, "nf", None) == child.weight.shape[1]:
            setattr(module, name, PackedLinear(child.weight.t(), child.bias))
        else:
            pack_linears(child)
