"""The one attention function that every model calls, and the batch that it reads.

The `transformers` model is used as it is: it passes unknown keywords through to the attention function, so a step's
batch travels as one argument. Keys and values are written to the page pool first, then attention reads them back.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import AttentionInterface

from kvferry.common.errors import IncompatibleNode

ATTENTION_NAME = "kvferry"


class PagedAttention(Protocol):
    """One step's attention over the page pool, on one kind of device."""

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the new tokens' keys and values, `[T, kv_heads, head_dim]` each."""
        ...

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        """`query[T, H, head_dim]` -> the same shape: causal over each row's context, which has been written."""
        ...


@dataclass(slots=True)
class PagedBatch:
    """A step's attention. `calls` counts the layers that asked, so that a model which attends on its own is noticed."""

    attention: PagedAttention
    calls: int = 0


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    paged_batch: PagedBatch,
    **_ignored: object,
) -> tuple[torch.Tensor, None]:
    """`query [1, H, T, head_dim]`, `key`, `value [1, kv_heads, T, head_dim]` -> `[1, T, H, head_dim]`.

    Raises IncompatibleNode for what this attention cannot do.
    """
    if attention_mask is not None:
        raise IncompatibleNode("the model brings an attention mask of its own; paged attention is causal only")
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise IncompatibleNode("sliding windows, softcapped logits and attention sinks are not supported yet")
    if key.shape != value.shape:
        raise IncompatibleNode(f"keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape")
    batch, layer = paged_batch, module.layer_idx
    batch.calls += 1
    batch.attention.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return batch.attention.attend(layer, query[0].transpose(0, 1), scale)[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
