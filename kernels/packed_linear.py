"""Linear layers on the CPU for the few rows of a decode step, where reading the weights is all the work.

bf16, where the machine multiplies it: weights laid out for oneDNN once, at load, by the two operators that torch's
inductor uses for that ("freezing"), called directly. Else the weights stay as they are, and few rows go through a
kernel of our own. bench/engine.py measures what they give together.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kvferry.kernels.few_rows import ENTRIES, MOST_ROWS, FewRows
from kvferry.kernels.native import has


class PackedLinear(nn.Module):
    """`x[..., inputs]` -> `[..., outputs]`, as the nn.Linear whose weight `[outputs, inputs]` and bias it was given. It
    shares their memory, unless it has laid the weight out anew."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach()
        if weight.dtype is torch.bfloat16 and lays_out_bf16():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        else:
            self._few_rows = FewRows(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        rows = x.numel() // self.in_features
        if rows > MOST_ROWS:
            return F.linear(x, self.weight, self.bias)
        out = self._few_rows(x.reshape(rows, self.in_features))
        out = out if self.bias is None else out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def lays_out_bf16() -> bool:
    """Whether this machine multiplies bf16, and this torch has oneDNN's operators for it."""
    return (
        has("avx512bf16", "amx-bf16")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a layer of ours for this device and dtype."""
    return device.type == "cpu" and dtype in ENTRIES


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
