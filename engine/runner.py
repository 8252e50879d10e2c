"""One step of the model: a plan in, next tokens out. Sees tensors, never queues."""

import torch

from kvferry.common.errors import Internal
from kvferry.engine.attention import lay_out
from kvferry.engine.batch import StepPlan
from kvferry.engine.model import LoadedModel
from kvferry.engine.sampler import sample
from kvferry.kernels.cpu_attention import Workspace


class Runner:
    """Runs plans over `kv`, the page pool's tensor `[num_blocks, kv_heads, layers, 2, block_size, head_dim]`.

    Not thread-safe: one step at a time. It writes only the blocks that a plan's rows name.
    """

    def __init__(self, model: LoadedModel, kv: torch.Tensor):
        self._model = model
        self._kv = kv
        self._workspace = Workspace()

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """`[R, vocab]`: a row of logits for each row of the plan that has a draw, after its last token."""
        tokens, positions, batch = lay_out(plan, self._kv, self._workspace)
        ends = [s.start + s.length - 1 for row, s in zip(plan.rows, batch.rows, strict=True) if row.draw is not None]
        # Without a draw the model still computes one row: it has no way to compute none.
        keep = torch.tensor(ends or [0], device=tokens.device)
        out = self._model.module(
            input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=keep, paged_batch=batch
        )
        return out.logits[0, : len(ends)]

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[int | None]:
        """The next token of each row, None where the row has no draw. Raises Internal when the model gives NaN."""
        logits = self.logits(plan)
        if logits.isnan().any():
            raise Internal("the model's logits are not numbers: it overflows in this dtype, or its weights are broken")
        draws = [row.draw for row in plan.rows if row.draw is not None]
        chosen = iter(sample(logits, draws) if draws else [])
        return [None if row.draw is None else next(chosen) for row in plan.rows]
