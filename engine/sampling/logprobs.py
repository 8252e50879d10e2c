"""What is told of a token beside itself: by the model's own logits, before any parameter."""

from collections.abc import Sequence

import torch

from kvferry.common.sampling import TokenLogprobs
from kvferry.engine.sampling.likely import LARGEST, blocks, likeliest


def tell(logits: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """Of `token_ids[i]` by `logits[i]`, with the `tops[i]` likeliest tokens beside it (at most the vocabulary).

    `logits[K, vocab]` are of any float dtype and without NaN. Log probabilities are log-softmax in float32; ranks and
    orders are those of the logits, of equal ones the lower token id first.
    """
    told: list[TokenLogprobs] = []
    for start, stop in blocks(len(token_ids), logits):
        raw = logits[start:stop].float().clamp(max=LARGEST)
        told += _tell_block(raw, token_ids[start:stop], tops[start:stop])
    return told


def _tell_block(raw: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    vocab, device = raw.shape[1], raw.device
    logprobs = raw.log_softmax(dim=1)
    tokens = torch.tensor(token_ids, device=device)[:, None]
    own = raw.gather(1, tokens)
    ahead = (raw > own) | ((raw == own) & (torch.arange(vocab, device=device) < tokens))
    columns = [logprobs.gather(1, tokens)[:, 0].tolist(), ahead.sum(1).tolist()]
    if count := min(max(tops), vocab):
        best = likeliest(raw, count)
        columns += [best.tolist(), logprobs.gather(1, best).tolist()]
    else:
        columns += [[[]] * len(raw)] * 2
    return [
        TokenLogprobs(logprob, rank, tuple(zip(best_ids[:top], values[:top], strict=True)))
        for logprob, rank, best_ids, values, top in zip(*columns, tops, strict=True)
    ]
