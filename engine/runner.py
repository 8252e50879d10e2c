"""One step of the model: a plan in, next tokens out. Sees tensors, never queues."""

import torch

from kvferry.common.errors import Internal
from kvferry.engine.batch import StepPlan
from kvferry.engine.inputs import lay_out
from kvferry.engine.model import LoadedModel
from kvferry.engine.sampler import Sampled, Sampler
from kvferry.kernels.cpu_attention import Workspace
from kvferry.kernels.reference import copy_blocks


class Runner:
    """Runs plans over `kv`, the page pool's tensor `[num_blocks, kv_heads, layers, 2, block_size, head_dim]`.

    Not thread-safe: one step at a time. It writes only the blocks that a plan's rows and copies name.
    """

    def __init__(self, model: LoadedModel, kv: torch.Tensor):
        self._model = model
        self._kv = kv
        self._workspace = Workspace()
        self._sampler = Sampler()

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """`[D, vocab]`: a row of logits for each draw of the plan, after the last token of its row."""
        if len(plan.copies):
            copy_blocks(self._kv, torch.from_numpy(plan.copies))
        inputs = lay_out(plan, self._kv, self._workspace)
        # Without a draw the model still computes one row: it has no way to compute none.
        ends = inputs.ends[plan.draw_rows] if plan.draws else inputs.ends[:1]
        out = self._model.module(
            input_ids=inputs.tokens,
            position_ids=inputs.positions,
            use_cache=False,
            logits_to_keep=torch.from_numpy(ends).to(self._kv.device),
            paged_batch=inputs.batch,
        )
        return out.logits[0, : len(plan.draws)]

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Sampled:
        """What each draw chose. Raises Internal when the model gives NaN."""
        logits = self.logits(plan)
        if logits.isnan().any():
            raise Internal("the model's logits are not numbers: it overflows in this dtype, or its weights are broken")
        return self._sampler.sample(logits, plan.draws)
