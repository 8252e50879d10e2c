"""The one attention function that every model calls, and the batch that it reads.

The `transformers` model is used as it is: it passes unknown keywords through to the attention function, so a step's
batch travels as one argument. Keys and values are written to the page pool first, then attention reads them back.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import AttentionInterface

from kvferry.common.errors import IncompatibleNode
from kvferry.kernels.reference import Scoring

ATTENTION_NAME = "kvferry"


class PagedAttention(Protocol):
    """One step's attention over the page pool, on one kind of device."""

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the new tokens' keys and values, `[T, kv_heads, head_dim]` each."""
        ...

    def attend(self, layer: int, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """`query[T, H, head_dim]` -> the same shape: causal over each row's context, which has been written."""
        ...


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """A step's attention, as it travels through the model."""

    attention: PagedAttention


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

    There is no mask: transformers makes none for an attention that its mask registry does not know. `self_check` has
    seen to it, when the model was loaded, that the mask it would make is the one attended by here, and that nothing
    among the ignored keywords matters. Raises IncompatibleNode for a mask that comes all the same.
    """
    if attention_mask is not None:
        raise IncompatibleNode("the model brings an attention mask of its own; paged attention is causal only")
    attention, layer = paged_batch.attention, module.layer_idx
    attention.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = attention.attend(layer, query[0].transpose(0, 1), Scoring(scale, sliding_window, softcap, s_aux))
    return attended[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
