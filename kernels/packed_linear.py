"""Linear layers on the CPU with weights laid out for oneDNN once, at load.

`F.linear` hands a plain weight to a general matrix product at each call; oneDNN reads a weight faster in its
own blocked order. These are the two operators that torch's inductor uses for that ("freezing"), called directly.
bench/engine.py measures what they give.
"""

import torch
from torch import nn

PACKED_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """`x[..., inputs]` -> `[..., outputs]`, as the nn.Linear whose weight `[outputs, inputs]` and bias it was given."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch, on this machine, has the operators."""
    return (
        device.type == "cpu"
        and dtype in PACKED_DTYPES
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (dtype is not torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linears(module: nn.Module) -> None:
    """Replace every nn.Linear below `module`, and transformers' Conv1D (GPT-2's transposed linear), in place. The
    plain weights are let go unless something else (a tied embedding) uses them."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child.weight, child.bias))
        elif type(child).__name__ == "Conv1D" and getattr(child, "nf", None) == child.weight.shape[1]:
            setattr(module, name, PackedLinear(child.weight.t(), child.bias))
        else:
            pack_linears(child)
