"""A plan as the tensors that the model and its attention take."""

from dataclasses import dataclass

import numpy as np
import torch

from kvferry.engine.attention import PagedBatch
from kvferry.engine.batch import StepPlan
from kvferry.kernels.cpu_attention import CpuAttention
from kvferry.kernels.reference import Ragged, ReferenceAttention
from kvferry.kernels.workspace import Workspace


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Token ids and positions, int64 `[1, T]` each, on the pool's device; `ends[R]` is where each row's last token
    stands among the T (on the CPU)."""

    tokens: torch.Tensor
    positions: torch.Tensor
    ends: np.ndarray
    batch: PagedBatch


def lay_out(plan: StepPlan, pool: torch.Tensor, workspace: Workspace) -> ModelInputs:
    """`pool[num_blocks, kv_heads, layers, 2, block_size, head_dim]` is the page pool's tensor."""
    device, block_size = pool.device, pool.shape[4]
    stops = np.cumsum(plan.lengths)
    starts = stops - plan.lengths
    if len(plan.lengths) == len(plan.token_ids):  # every row has one token
        rows, positions = np.arange(len(stops)), plan.positions
    else:
        rows = np.repeat(np.arange(len(stops)), plan.lengths)
        positions = np.arange(len(rows)) + np.repeat(plan.positions - starts, plan.lengths)
    slots = plan.tables[rows, positions // block_size] * block_size + positions % block_size
    ragged = Ragged(
        torch.from_numpy(starts),
        torch.from_numpy(plan.lengths),
        torch.from_numpy(plan.positions + plan.lengths),
        torch.from_numpy(plan.tables).to(device),
    )
    slot_mapping = torch.from_numpy(slots).to(device)
    if device.type == "cpu":
        attention = CpuAttention(pool, workspace, ragged, slot_mapping)
    else:
        attention = ReferenceAttention(pool, ragged, slot_mapping)
    tokens, at = (torch.from_numpy(array)[None].to(device) for array in (plan.token_ids, positions))
    return ModelInputs(tokens, at, stops - 1, PagedBatch(attention))
