"""The reference that served tokens are held to: `transformers.generate`, fp32, greedy, in this process.

The rule is DESIGN section 11: equal tokens, or, at the first difference, a reference so undecided that either token is
right: the two logits lie closer together than 1e-3 of the logits' standard deviation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

UNDECIDED = 1e-3


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the logits each was chosen from: `[len(tokens), vocab]`."""

    tokens: list[int]
    logits: torch.Tensor

    def difference(self, served: Sequence[int]) -> str:
        """Why `served` is wrong, for a person; empty when it is right."""
        if len(served) != len(self.tokens):
            return f"{len(served)} tokens were served, {len(self.tokens)} expected: {list(served)} / {self.tokens}"
        at = next((i for i, pair in enumerate(zip(served, self.tokens, strict=True)) if pair[0] != pair[1]), None)
        if at is None:
            return ""
        row = self.logits[at]
        gap = float((row[self.tokens[at]] - row[served[at]]) / row.std())
        if gap < UNDECIDED:
            return ""
        return (
            f"token {at} of {len(served)} is {served[at]}, expected {self.tokens[at]}; the reference prefers it by "
            f"{gap:.3g} standard deviations"
        )


class Oracle:
    """One checkpoint's reference. Answers are kept, so asking again for the same prompt is free."""

    def __init__(self, checkpoint: Path):
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None  # requests come with ignore_eos
        self._known: dict[tuple[tuple[int, ...], int], Answer] = {}

    def refuses(self, prompt: Sequence[int], served: Sequence[int]) -> str:
        """Why `served` is not the answer to `prompt`; empty when it is."""
        return self.answer(prompt, len(served)).difference(served)

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        key = (tuple(prompt), max_tokens)
        if key not in self._known:
            self._known[key] = self._generate(list(prompt), max_tokens)
        return self._known[key]

    @torch.inference_mode()
    def _generate(self, prompt: list[int], max_tokens: int) -> Answer:
        ids = torch.tensor([prompt])
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            do_sample=False,
            max_new_tokens=max_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return Answer(out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits))
