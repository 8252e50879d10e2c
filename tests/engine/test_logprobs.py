"""What is told of tokens, against plain sums: log probability, rank, and the likeliest."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.common.sampling import SamplingParams, TokenLogprobs
from kvferry.engine.batch import Draw
from kvferry.engine.sampling.sampler import Sampler

VOCAB = 41


def logits_for(seed: int, rows: int, whole: bool, vocab: int = VOCAB) -> torch.Tensor:
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return logits.round() if whole else logits


def told_of(logits: list[float], token: int, top: int) -> tuple[float, int, list[int], list[float]]:
    best = max(logits)
    total = best + math.log(math.fsum(math.exp(x - best) for x in logits))
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    return logits[token] - total, order.index(token), order[:top], [logits[i] - total for i in order[:top]]


def check(told: TokenLogprobs, logits: list[float], token: int, top: int) -> None:
    logprob, rank, ids, values = told_of(logits, token, top)
    assert told.logprob == pytest.approx(logprob, abs=2e-5)
    assert told.rank == rank
    assert [token for token, _ in told.top] == ids
    assert [value for _, value in told.top] == pytest.approx(values, abs=2e-5)


TOPS = st.sampled_from([0, 1, 5, VOCAB, VOCAB + 9])
SEEDS = st.integers(0, 2**32)


@settings(deadline=None)
@given(seed=SEEDS, whole=st.booleans(), tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), top=TOPS)
def test_scores_of_known_tokens(seed, whole, tokens, top):
    logits = logits_for(seed, len(tokens), whole)
    told = Sampler().score(logits, tokens, top)
    for one, row, token in zip(told, logits.double().tolist(), tokens, strict=True):
        check(one, row, token, top)
    assert [Sampler().score(logits[i : i + 1], [token], top)[0] for i, token in enumerate(tokens)] == told


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7]),
    top_k=st.sampled_from([0, 3]),
    logit_bias=st.sampled_from([(), ((4, 100.0), (5, -100.0))]),
    presence_penalty=st.sampled_from([0.0, 2.0]),
    logprobs=st.none() | TOPS,
    seed=SEEDS,
)


@settings(deadline=None)
@given(params=st.lists(PARAMS, min_size=1, max_size=5), seed=SEEDS, whole=st.booleans())
def test_drawn_tokens_are_told_by_the_models_own_logits(params, seed, whole):
    draws = [Draw(its, (), [1, 2, 3], 1) for its in params]
    logits = logits_for(seed, len(draws), whole)
    sampled = Sampler().sample(logits, draws)
    silent = [Draw(SamplingParams(**{n: getattr(its, n) for n in its.__slots__} | {"logprobs": None}), (), [1, 2, 3], 1)
              for its in params]  # fmt: skip
    assert Sampler().sample(logits, silent).tokens == sampled.tokens, "telling changes nothing"
    if all(its.logprobs is None for its in params):
        assert sampled.logprobs is None
        return
    for one, its, row, token in zip(sampled.logprobs, params, logits.double().tolist(), sampled.tokens, strict=True):
        if its.logprobs is None:
            assert one is None
        else:
            check(one, row, token, its.logprobs)


def test_impossible_tokens_are_told_too():
    logits = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]])
    (told,) = Sampler().score(logits, [3], 4)
    half = pytest.approx(-math.log(2))
    assert (told.logprob, told.rank) == (float("-inf"), 3)
    assert told.top == ((0, half), (2, half), (1, float("-inf")), (3, float("-inf")))


def test_a_long_prompt_is_scored_in_blocks():
    logits = logits_for(1, 200, False, vocab=5000)
    tokens = [i * 7 % 5000 for i in range(200)]
    told = Sampler().score(logits, tokens, 2)
    for i in (0, 57, 199):
        check(told[i], logits[i].double().tolist(), tokens[i], 2)
        assert Sampler().score(logits[i : i + 1], [tokens[i]], 2) == [told[i]]
    assert Sampler().score(logits[:0], [], 2) == []


def test_half_precision_is_told_in_float32():
    logits = logits_for(2, 3, False).to(torch.bfloat16)
    assert Sampler().score(logits, [1, 2, 3], 3) == Sampler().score(logits.float(), [1, 2, 3], 3)
