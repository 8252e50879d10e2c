"""Sampling as a pure function of (logits, parameters, seed, choice, position, the tokens before).

The order is that which vLLM documents for its v1 sampler:

1. bars (bad words; what would end the sequence before `min_tokens`) and `logit_bias`;
2. penalties: repetition (over prompt and generated tokens: positive logits are divided, others multiplied), then
   frequency and presence (over generated tokens);
3. greedy rows take their best token now; for others temperature, `min_p`, `top_k`, `top_p`, and a draw by noise.

Bad words look back over the whole sequence, prompt included. If all tokens are barred the answer is token 0. Of equals
the lower token id is first, everywhere. Logits are worked on in float32, weights are added as integers, and the draw
itself is float64. Nothing depends on the batch. Two devices choose the same tokens from the same logits, unless a
decision hangs on the last bit of a quotient in float32 or of an exp or log in float64, which they may round otherwise.
"""

from dataclasses import dataclass

import torch

from kvferry.common.sampling import TokenLogprobs
from kvferry.engine.batch import Draw
from kvferry.engine.sampling.edits import edits_of
from kvferry.engine.sampling.likely import LARGEST, at_least, blocks, compact, keep_likely
from kvferry.engine.sampling.logprobs import tell
from kvferry.engine.sampling.philox import Keys
from kvferry.engine.sampling.race import HOPELESS, draw_among, draw_from_all
from kvferry.engine.sampling.ready import Group, Ready, Way, make_ready

# Where not one in FEW tokens can win, noise for those alone is cheaper. Whether that is so, one in SPARSE tells.
FEW, SPARSE = 8, 16


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token for each draw, and what is told of it where that was asked for; `logprobs` is None when nobody asked."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None


class Sampler:
    """Chooses tokens. What it keeps from step to step are the last draws' parameters, made ready, and buffers: neither
    can change an answer. Not thread-safe."""

    def __init__(self) -> None:
        self._ready: Ready | None = None
        self._buffers = torch.empty(0, dtype=torch.int64)

    def sample(self, logits: torch.Tensor, draws: list[Draw]) -> Sampled:
        """`logits[D, vocab]`, of any float dtype and without NaN, one row a draw. They are not changed."""
        if self._ready is None or not self._ready.is_for(draws, logits):
            self._ready = make_ready(draws, logits, self._ready)
        ready = self._ready
        best = argmax(logits) if ready.plain or not draws else logits.new_empty(len(draws), dtype=torch.int64)
        edits = edits_of(ready.edited, ready.fixed, ready.vocab) if ready.edited else None
        for group in ready.groups:
            keys = None if group.way is Way.GREEDY else group.keys()
            for start, stop in blocks(len(group.draws), logits):
                rows = group.rows[start:stop]
                block = logits.index_select(0, rows).float()
                if edits is not None and group.edited is not None:
                    edits.apply(block, group.edited + start)
                if keys is None:
                    best[rows] = argmax(block)
                else:
                    best[rows] = self._draw(block, group, start, keys.rows(start, stop))
        tokens = best.tolist()
        return Sampled(tokens, _told(logits, tokens, ready) if ready.told else None)

    def score(self, logits: torch.Tensor, token_ids: list[int], top: int) -> list[TokenLogprobs]:
        """What is told of `token_ids[K]` by `logits[K, vocab]`, each with the `top` likeliest tokens beside it."""
        return tell(logits, token_ids, [top] * len(token_ids))

    def _draw(self, block: torch.Tensor, group: Group, start: int, keys: Keys) -> torch.Tensor:
        """int64 `[r]`, drawn for rows `start` and on of the group. `block`, their logits, is overwritten."""
        stop = start + len(block)
        # Under the best one, so that a tiny temperature makes the others vanish instead of all overflow. The limits are
        # for rows of nothing but -inf, and for +inf.
        block.clamp_(max=LARGEST)
        scores = block.sub_(block.amax(dim=1, keepdim=True).clamp_(min=-LARGEST)).div_(group.temperature[start:stop])
        if group.floor is not None:
            scores.masked_fill_(scores < group.floor[start:stop], float("-inf"))
        if group.way is not Way.FROM_ALL:
            return draw_among(*keep_likely(scores, group.top_k[start:stop], group.top_p[start:stop]), keys)
        sample = scores[:, ::SPARSE]
        hopeless = torch.full_like(scores[:, :1], HOPELESS)
        if len(at_least(sample, hopeless)[0]) * FEW < sample.numel():
            return draw_among(*compact(scores, hopeless), keys)
        return draw_from_all(scores, keys, self._buffers_for(scores))

    def _buffers_for(self, scores: torch.Tensor) -> torch.Tensor:
        needed = 8 * len(scores) * -(-scores.shape[1] // 4)
        if len(self._buffers) < needed or self._buffers.device != scores.device:
            self._buffers = torch.empty(needed, dtype=torch.int64, device=scores.device)
        return self._buffers


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """int64 `[R]`: the first of the largest of each row, `logits[R, vocab]` being without NaN. On a CPU NumPy finds it,
    whose search is vectorised."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=1)
    return torch.from_numpy(logits.float().numpy().argmax(axis=1))


def _told(logits: torch.Tensor, tokens: list[int], ready: Ready) -> list[TokenLogprobs | None]:
    answer: list[TokenLogprobs | None] = [None] * len(tokens)
    tops = [ready.draws[row].params.logprobs or 0 for row in ready.told]
    told = tell(logits[ready.told], [tokens[row] for row in ready.told], tops)
    for row, one in zip(ready.told, told, strict=True):
        answer[row] = one
    return answer
