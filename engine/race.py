"""Drawing a token: the one with the greatest score + Gumbel noise, which is each with its probability (Gumbel-max).

The sum is float64 and of equal sums the lower token id wins. It is computed only for the few tokens that may win:
with u the token's uniform number, e = -log u and p = exp(score), the greatest sum is the least e / p, and
1 - u <= e. So nobody wins whose (1 - u) / p is above the e / p of any other token; and 1 - u and p do in float32.
"""

import torch

from kvferry.engine.philox import BUFFERS, MASK32, Keys, bits_of, gumbel, words

# The noise lies between -log(33 log 2) > -3.2 and 33 log 2 < 22.9: what is this far below the best score cannot win.
HOPELESS = -26.1
SLACK = 1 + 1e-5  # more than exp, the conversion and two products lose in float32


def draw_among(tokens: torch.Tensor, scores: torch.Tensor, keys: Keys) -> torch.Tensor:
    """int64 `[R]`: the winner of each row of candidates, `tokens` int64 `[R, C]` and `scores` float32 `[R, C]`."""
    sums = scores.double() + gumbel(bits_of(tokens, keys))
    return tokens.masked_fill(sums < sums.amax(1, keepdim=True), MASK32).amin(1)


def draw_from_all(scores: torch.Tensor, keys: Keys, buffers: torch.Tensor) -> torch.Tensor:
    """int64 `[R]`: the winner of each row of `scores` float32 `[R, vocab]`, whose best is 0.

    `buffers`, int64 `[BUFFERS * R * lanes]` at least, is overwritten.
    """
    rows, vocab = scores.shape
    lanes = -(-vocab // 4)
    buffers = buffers[: BUFFERS * rows * lanes].view(BUFFERS, rows, lanes)
    words(torch.arange(lanes, device=scores.device)[None], keys, buffers)
    bits = buffers[4:]
    rest = torch.empty(rows, lanes, 4, device=scores.device)
    rest.copy_((bits ^ MASK32).permute(1, 2, 0))  # 2^32 - 1 - bits, so that a number near 0 keeps all its digits
    rest = rest.view(rows, 4 * lanes)[:, :vocab].add_(0.5)
    times = torch.exp(-scores).mul_(rest)  # (1 - u) / p in units of 2^-32; never NaN
    least, at = times.min(dim=1, keepdim=True)
    bound = (least.double() * (_above_e(rest.gather(1, at)) * SLACK)).float()
    row, token = (times <= bound).nonzero(as_tuple=True)
    sums = scores[row, token].double() + gumbel(bits[token & 3, row, token >> 2])
    best = torch.full((rows,), float("-inf"), dtype=torch.float64, device=scores.device)
    best.scatter_reduce_(0, row, sums, "amax")
    tied = sums == best[row]
    return torch.full_like(best, MASK32, dtype=torch.int64).scatter_reduce_(0, row[tied], token[tied], "amin")


def _above_e(rest: torch.Tensor) -> torch.Tensor:
    """A bound above of e / (1 - u), float64, for 1 - u in units of 2^-32 that was rounded to float32."""
    share = rest.double() / 2.0**32
    return -torch.log((1 - share * (1 + 2.0**-23)).clamp(min=2.0**-33)) / share
