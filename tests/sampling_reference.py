"""What a sampler has to do, one row at a time, in plain Python numbers."""

import math
from collections.abc import Iterable

from hypothesis import assume

from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Draw

ONES = 0xFFFFFFFF
CLEAR = 1e-4  # float32 may decide otherwise what is closer than this without being equal


def clear(a: float, b: float) -> None:
    """Reject an example that hangs on the last bits."""
    assume(a == b or not abs(a - b) < CLEAR)


def philox_in_integers(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        one, two = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (two >> 32) ^ c1 ^ k0, two & ONES, (one >> 32) ^ c3 ^ k1, one & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return [c0, c1, c2, c3]


def noise_of(token: int, seed: int, choice: int, position: int) -> float:
    counter = [token // 4, position & ONES, position >> 32, choice]
    word = philox_in_integers(counter, (seed & ONES, seed >> 32))[token % 4]
    return -math.log(-math.log((word + 0.5) / 2**32))


def first_of(tokens: Iterable[int], value) -> int:
    """The token of the greatest value, of equal ones the lowest. Rejects a close second."""
    ordered = sorted(tokens, key=lambda token: (-value(token), token))
    if len(ordered) > 1:
        clear(value(ordered[0]), value(ordered[1]))
    return ordered[0]


def edited(logits: list[float], draw: Draw) -> list[float]:
    """Bars and biases, then repetition, frequency and presence penalties."""
    params, ids = draw.params, draw.token_ids
    generated = ids[draw.prompt_len :]
    out = list(logits)
    for token, bias in params.logit_bias:
        out[token] += bias
    if len(generated) < params.min_tokens:
        for token in draw.stop_ids:
            out[token] = -math.inf
    for word in params.bad_words:
        *start, last = word
        if start == ids[len(ids) - len(start) :] and len(start) <= len(ids):
            out[last] = -math.inf
    for token in set(ids):
        factor = params.repetition_penalty
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token in set(generated):
        out[token] -= params.frequency_penalty * generated.count(token)
        out[token] -= params.presence_penalty
    return out


def kept(logits: list[float], params: SamplingParams) -> tuple[list[int], dict[int, float]]:
    """The tokens that min_p, top_k and top_p leave, most likely first, and every token's logit by temperature. At
    least one token must not be barred."""
    best = max(logits)
    scores = {i: (x - best) / params.temperature for i, x in enumerate(logits) if x > -math.inf}
    order = sorted(scores, key=lambda i: (-scores[i], i))
    if params.min_p > 0:
        for i in order:
            clear(scores[i], math.log(params.min_p))
        order = [i for i in order if scores[i] >= math.log(params.min_p)]
    if 0 < params.top_k < len(order):
        clear(scores[order[params.top_k - 1]], scores[order[params.top_k]])
        order = order[: params.top_k]
    if params.top_p < 1:
        weights = [math.exp(scores[i]) for i in order]
        left, before = 0, 0.0
        for weight in weights:
            share = before / sum(weights)
            clear(share, params.top_p)
            if left and share >= params.top_p:
                break
            left, before = left + 1, before + weight
        order = order[:left]
    return order, scores


def choose(logits: list[float], draw: Draw) -> int:
    params, logits = draw.params, edited(logits, draw)
    if max(logits) == -math.inf:
        return 0
    if params.temperature == 0:
        return first_of(range(len(logits)), lambda i: logits[i])
    tokens, scores = kept(logits, params)
    position = len(draw.token_ids)
    return first_of(tokens, lambda i: scores[i] + noise_of(i, params.seed, params.choice, position))
