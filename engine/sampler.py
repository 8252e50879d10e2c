"""Sampling as a pure function of (logits, parameters, seed, choice, position).

Drawing is by the Gumbel-max trick: argmax(logits / temperature + g), where g = -log(-log u) and u comes from the
counter-based generator Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) keyed by
the seed and counted by (vocabulary index, position, choice). Nothing depends on the batch or on what was drawn before.
"""

import torch

from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Draw

MASK32 = 0xFFFFFFFF
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85


def _mul32(a: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * constant, both unsigned 32-bit values held in int64.

    The product wraps modulo 2^64 (two's complement), so all of its 64 bits are there.
    """
    product = a * constant
    return (product >> 32) & MASK32, product & MASK32


def philox(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10: four int64 tensors holding 32-bit words -> four like them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mul32(c0, PHILOX_M0)
        high1, low1 = _mul32(c2, PHILOX_M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_W0) & MASK32, (k1 + PHILOX_W1) & MASK32
    return [c0, c1, c2, c3]


def gumbel_noise(vocab: int, draw: Draw, device: torch.device) -> torch.Tensor:
    """float64 `[vocab]`: Gumbel(0, 1) noise for one draw. Each counter gives the noise of four neighbours."""
    lanes = torch.arange(-(-vocab // 4), dtype=torch.int64, device=device)
    fixed = [torch.full_like(lanes, word & MASK32) for word in (draw.position, draw.position >> 32, draw.params.choice)]
    seed = draw.params.seed
    words = philox([lanes, *fixed], (seed & MASK32, (seed >> 32) & MASK32))
    bits = torch.stack(words, dim=1).flatten()[:vocab]
    uniform = (bits.to(torch.float64) + 0.5) / 2.0**32
    return -torch.log(-torch.log(uniform))


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    """One token id for each row of `logits[R, vocab]` (any float dtype)."""
    logits = logits.float().clone()
    for row, draw in enumerate(draws):
        if draw.generated < draw.params.min_tokens and draw.stop_ids:
            logits[row, list(draw.stop_ids)] = float("-inf")
    tokens = logits.argmax(dim=1)
    warm = [row for row, draw in enumerate(draws) if draw.params.temperature > 0]
    if warm:
        chosen = [draws[row] for row in warm]
        scores = keep_likely(logits[warm], [d.params for d in chosen])
        noise = torch.stack([gumbel_noise(logits.shape[1], draw, logits.device) for draw in chosen])
        tokens[warm] = (scores.double() + noise).argmax(dim=1)
    return tokens.tolist()


def keep_likely(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Scale by temperature, then bar what top_k and top_p leave out: `[R, vocab]` float32 -> the same.

    top_p keeps the smallest set of most likely tokens, after top_k, whose probability reaches p; at least one.
    """
    device, vocab = logits.device, logits.shape[1]
    # Under the most likely one, so that a tiny temperature makes the others vanish instead of all overflow.
    temperature = torch.tensor([[p.temperature] for p in params], device=device).clamp(min=torch.finfo().tiny)
    scores = (logits - logits.amax(dim=1, keepdim=True)) / temperature
    if all(p.top_k == 0 and p.top_p >= 1.0 for p in params):
        return scores
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(vocab, device=device)
    top_k = torch.tensor([[p.top_k or vocab] for p in params], device=device)
    ordered = ordered.masked_fill(rank >= top_k, float("-inf"))
    probability = ordered.softmax(dim=1)
    before = probability.cumsum(dim=1) - probability
    top_p = torch.tensor([[p.top_p] for p in params], device=device)
    ordered = ordered.masked_fill((before >= top_p) & (rank > 0) & (top_p < 1.0), float("-inf"))
    return torch.empty_like(scores).scatter_(1, order, ordered)
