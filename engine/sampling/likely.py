"""Which tokens are likeliest. One order everywhere: the higher score first, of equal ones the lower token id.

Scores are float32 `[R, vocab]`, never NaN. No row is sorted whole unless that much of it may be asked for: what
cannot be among the answer is left out first.
"""

from collections.abc import Iterator

import numpy as np
import torch

LARGEST = torch.finfo(torch.float32).max
CACHED_LOGITS = 2**18  # rows are worked on in blocks of so many: on a CPU the temporaries stay in the caches
DEVICE_LOGITS = 2**24  # on other devices they stay under 1 GB
WEIGHT_OF_BEST = 2.0**43  # so that the integer weights of a million tokens add up in 64 bits


def blocks(rows: int, logits: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Where each block of so many rows like those of `logits[..., vocab]` begins and ends."""
    size = CACHED_LOGITS if logits.device.type == "cpu" else DEVICE_LOGITS
    step = max(1, size // logits.shape[-1])
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def likeliest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """int64 `[R, count]`: the first `count` tokens of each row in order. `count` is at most the vocabulary."""
    least = scores.topk(count, dim=1, sorted=True).values[:, -1:]
    tokens, _ = in_order(*compact(scores, least))
    return tokens[:, :count]


def at_least(values: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and tokens, both int64, of the `values` float32 `[R, vocab]` that are not below their row's `least`
    `[R, 1]`, ordered by row and then token."""
    if values.device.type != "cpu":
        return (values >= least).nonzero(as_tuple=True)
    found = np.flatnonzero(values.numpy() >= least.numpy())  # torch is slow at this
    rows, tokens = np.divmod(found, values.shape[1])
    return torch.from_numpy(rows), torch.from_numpy(tokens)


def compact(scores: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of each row whose score is not below its `least` `[R, 1]`, by id, and their scores: `[R, C]`, C being
    what the fullest row has, at least one. After a row's last one come entries of token 0 and score -inf."""
    rows, tokens = at_least(scores, least)
    counts = rows.bincount(minlength=len(scores))
    width = max(1, int(counts.amax()))
    at = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    kept_tokens = torch.zeros(len(scores), width, dtype=torch.int64, device=scores.device)
    kept_scores = torch.full((len(scores), width), float("-inf"), device=scores.device)
    kept_tokens[rows, at] = tokens
    kept_scores[rows, at] = scores[rows, tokens]
    return kept_tokens, kept_scores


def in_order(tokens: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of compacted tokens and scores, the likeliest first."""
    # A float's bits, below the sign, rise with its size; +0.0 makes one zero of two. With the place behind them no two
    # keys are equal, so any way of sorting gives the same. On a CPU torch's is slow.
    bits = (scores + 0.0).view(torch.int32)
    falling = ~torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (falling.to(torch.int64) << 32) | torch.arange(scores.shape[1], device=scores.device)
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)
    else:
        keys = keys.sort(dim=1).values
    places = keys & 0xFFFFFFFF
    return tokens.gather(1, places), scores.gather(1, places)


def keep_likely(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What top_k and then top_p leave, in order: tokens and scores `[R, C]`, -inf behind the last one of each row.

    `scores` are 0 for the likeliest token and natural logarithms of weights relative to it; `top_k` int64 `[R, 1]`, the
    vocabulary's size for off; `top_p` float64 `[R, 1]`, 1 for off. top_p keeps the smallest set of leading tokens whose
    weight reaches that share of what top_k left; at least one. Weights are added as integers, 2^43 for the likeliest,
    so the sums do not hang on their order.
    """
    vocab = scores.shape[1]
    by_count, by_share = top_k < vocab, top_p < 1.0
    least, total = torch.full_like(top_p, -LARGEST), None
    if by_count.any():
        ordered = scores.topk(int(top_k.masked_fill(~by_count, 1).amax()), dim=1, sorted=True).values
        last = ordered.gather(1, top_k.clamp(max=ordered.shape[1]) - 1).double()
        least = torch.where(by_count, last.clamp_(min=-LARGEST), least)
    if (by_share & ~by_count).any():
        total = integer_weights(scores).sum(1, keepdim=True)
        # If a token's weight times the vocabulary is less than the share that is dropped, so is all that comes after
        # the leading set that ends before it. Less 1 for the rounding of weights; the margin is for the rest.
        cut = (total * (1.0 - top_p) / vocab - 1).clamp_(min=0.0)
        least = torch.where(by_count, least, (torch.log(cut / WEIGHT_OF_BEST) - 1e-5).clamp_(min=-LARGEST))
    tokens, kept = in_order(*compact(scores, least.float()))
    rank = torch.arange(kept.shape[1], device=kept.device)
    kept = kept.masked_fill(rank >= top_k, float("-inf"))
    if by_share.any():
        weights = integer_weights(kept)
        left = weights.sum(1, keepdim=True)
        left = left if total is None else torch.where(by_count, left, total)
        before = weights.cumsum(1) - weights
        beyond = (before.double() >= left * top_p) & by_share & (rank > 0)
        kept = kept.masked_fill(beyond, float("-inf"))
    width = max(1, int((kept > float("-inf")).sum(1).amax()))
    return tokens[:, :width], kept[:, :width]


def integer_weights(scores: torch.Tensor) -> torch.Tensor:
    """int64, exp(score) in units of 2^-43."""
    return torch.exp(scores.double()).mul_(WEIGHT_OF_BEST).round_().to(torch.int64)
