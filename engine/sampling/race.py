"""Drawing a token: the one with the greatest score + Gumbel noise, which is each with its probability (Gumbel-max).

The sum is float64 and of equal sums the lower token id wins. It is computed only for the few tokens that may win:
with u the token's uniform number, e = -log u and p = exp(score), the greatest sum is the greatest p / e, and
e >= 1 - u. So nobody wins whose p / (1 - u) is below the p / e of any other token; and float32 will do for both.
"""

import torch

from kvferry.engine.sampling.likely import at_least
from kvferry.engine.sampling.philox import MASK32, Keys, bits_of, bits_of_all, gumbel

# The noise lies between -log(33 log 2) > -3.2 and 33 log 2 < 22.9: what is this far below the best score cannot win.
HOPELESS = -26.1
SLACK = 1 + 1e-5  # more than exp, a conversion and a quotient lose in float32


def draw_among(tokens: torch.Tensor, scores: torch.Tensor, keys: Keys) -> torch.Tensor:
    """int64 `[R]`: the winner of each row of candidates, `tokens` int64 `[R, C]` and `scores` float32 `[R, C]`."""
    sums = scores.double() + gumbel(bits_of(tokens, keys))
    return tokens.masked_fill(sums < sums.amax(1, keepdim=True), MASK32).amin(1)


def draw_from_all(scores: torch.Tensor, keys: Keys, buffers: torch.Tensor) -> torch.Tensor:
    """int64 `[R]`: the winner of each row of `scores` float32 `[R, vocab]`, whose best is 0. `buffers` are those that
    `bits_of_all` takes for so many rows and a lane for four tokens."""
    rows, vocab = scores.shape
    lanes = -(-vocab // 4)
    bits = bits_of_all(lanes, keys, buffers)
    rest = torch.empty(rows, lanes, 4, device=scores.device)
    rest.copy_((bits ^ MASK32).permute(1, 2, 0))  # 2^32 - 1 - bits, so that a number near 0 keeps all its digits
    rest = rest.view(rows, 4 * lanes)[:, :vocab].add_(0.5)
    chance = torch.exp(scores).div_(rest)  # p / (1 - u) in units of 2^32
    row, token = at_least(chance, _below_the_winner(chance.amax(dim=1, keepdim=True)))
    sums = scores[row, token].double() + gumbel(bits[token & 3, row, token >> 2])
    best = torch.full((rows,), float("-inf"), dtype=torch.float64, device=scores.device)
    best.scatter_reduce_(0, row, sums, "amax")
    tied = sums == best[row]
    return torch.full_like(best, MASK32, dtype=torch.int64).scatter_reduce_(0, row[tied], token[tied], "amin")


def _below_the_winner(chance: torch.Tensor) -> torch.Tensor:
    """A bound below the winner's p / (1 - u), by that of the token that has the greatest one: its p / e.

    e / (1 - u) rises with 1 - u, which is at most (1 - u) / p because p <= 1.
    """
    most = (1 / (chance.double() * 2.0**32)).clamp_(max=1.0)
    e = -torch.log((1 - most * SLACK).clamp_(min=2.0**-33))
    return (chance.double() * most / (e * SLACK)).float()
