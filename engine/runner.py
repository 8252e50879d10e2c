"""One step of the model: a plan in, next tokens out. Sees tensors, never queues."""

import numpy as np
import torch

from kvferry.engine.batch import Outcome, StepPlan
from kvferry.engine.inputs import lay_out
from kvferry.engine.loading.model import LoadedModel
from kvferry.engine.sampling.sampler import Sampler
from kvferry.kernels.reference import copy_blocks
from kvferry.kernels.workspace import Workspace


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
        """`[D + S + U, vocab]`: logits for each draw of the plan, after the last token of its row; then for each token
        that is to be scored; then for the last token of each row that has neither, which tells whether it is broken."""
        if len(plan.copies):
            copy_blocks(self._kv, torch.from_numpy(plan.copies))
        inputs = lay_out(plan, self._kv, self._workspace)
        wanted = [inputs.ends[plan.draw_rows]]
        for score in plan.scores:
            first = inputs.ends[score.row] + 1 - plan.lengths[score.row] + score.first
            wanted.append(np.arange(first, first + len(score.token_ids)))
        wanted.append(inputs.ends[unseen_rows(plan)])
        out = self._model.module(
            input_ids=inputs.tokens,
            position_ids=inputs.positions,
            use_cache=False,
            logits_to_keep=torch.from_numpy(np.concatenate(wanted)).to(self._kv.device),
            paged_batch=inputs.batch,
        )
        return out.logits[0]

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Outcome:
        """What each draw chose, what each score tells, and which rows failed because the model gave NaN."""
        logits = self.logits(plan)
        broken = logits.amax(dim=1).isnan()  # a maximum over NaN is NaN
        failed_rows: set[int] = set()
        if broken.any():
            scored = [score.row for score in plan.scores for _ in score.token_ids]
            rows = [*plan.draw_rows.tolist(), *scored, *unseen_rows(plan).tolist()]
            failed_rows = {row for row, bad in zip(rows, broken.tolist(), strict=True) if bad}
            logits = logits.masked_fill(broken[:, None], 0.0)  # so that the others' tokens can be chosen
        drawn = self._sampler.sample(logits[: len(plan.draws)], plan.draws)
        told, at = [], len(plan.draws)
        for score in plan.scores:
            rows = logits[at : at + len(score.token_ids)]
            told.append(self._sampler.score(rows, score.token_ids, score.top))
            at += len(rows)
        return Outcome(drawn.tokens, drawn.logprobs, told, failed_rows)


def unseen_rows(plan: StepPlan) -> np.ndarray:
    """The rows whose logits nobody asks for: chunks before the last one of a prompt."""
    rows = np.arange(len(plan.seq_ids))
    if np.array_equal(rows, plan.draw_rows):  # a step of decoding
        return rows[:0]
    return np.setdiff1d(rows, [*plan.draw_rows, *(score.row for score in plan.scores)])
