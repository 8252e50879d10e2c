"""Sampling: the generator against its published vectors, the choice against a row-by-row reference in plain Python, and
that nothing but the draw itself decides."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Draw
from kvferry.engine.sampler import gumbel_noise, keep_likely, philox, sample

CPU = torch.device("cpu")
ONES = 0xFFFFFFFF

# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, (ONES, ONES), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def run_philox(counter, key):
    return [int(word) for word in philox([torch.tensor([word], dtype=torch.int64) for word in counter], key)]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert run_philox(counter, key) == answer


def philox_in_integers(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        one, two = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (two >> 32) ^ c1 ^ k0, two & ONES, (one >> 32) ^ c3 ^ k1, one & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return [c0, c1, c2, c3]


WORD = st.integers(0, ONES)


@settings(deadline=None)
@given(counter=st.lists(WORD, min_size=4, max_size=4), key=st.tuples(WORD, WORD))
def test_philox_for_any_counter(counter, key):
    assert run_philox(counter, key) == philox_in_integers(counter, key)


# -- the reference: one row, no tensors -------------------------------------------------------------------------------


def noise_of(index: int, draw: Draw) -> float:
    seed, position = draw.params.seed, draw.position
    counter = [index // 4, position & ONES, position >> 32, draw.params.choice]
    word = philox_in_integers(counter, (seed & ONES, seed >> 32))[index % 4]
    return -math.log(-math.log((word + 0.5) / 2**32))


def likely(logits: list[float], params: SamplingParams) -> list[int]:
    """The tokens that top_k and top_p leave, most likely first. Rejects what hangs on the last bit of a sum."""
    scores = [x / params.temperature for x in logits]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: params.top_k or None]
    weights = [math.exp(scores[i] - scores[order[0]]) for i in order]
    kept, before = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        share = before / sum(weights)
        assume(abs(share - params.top_p) > 1e-5 or params.top_p >= 1)
        if kept and params.top_p < 1 and share >= params.top_p:
            break
        kept.append(token)
        before += weight
    return kept


def choose(logits: list[float], draw: Draw) -> int:
    params = draw.params
    barred = set(draw.stop_ids) if draw.generated < params.min_tokens else set()
    logits = [-math.inf if i in barred else x for i, x in enumerate(logits)]
    if params.temperature == 0:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    finite = [i for i, x in enumerate(logits) if x > -math.inf]
    kept = [finite[i] for i in likely([logits[i] for i in finite], params)]
    return max(kept, key=lambda i: logits[i] / params.temperature + noise_of(i, draw))


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.9]),
    top_p=st.sampled_from([1.0, 0.999, 0.91, 0.5, 0.13, 1e-6]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 3),
    min_tokens=st.sampled_from([0, 3]),
)
DRAWS = st.builds(
    Draw,
    params=PARAMS,
    position=st.integers(0, 2**33),
    generated=st.integers(0, 4),
    stop_ids=st.sampled_from([(), (0,), (3, 7, 11)]),
)
BATCHES = st.lists(DRAWS, min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32)


def logits_for(seed: int, rows: int, vocab: int = 41) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=200)
@given(draws=BATCHES, seed=SEEDS)
def test_each_row_is_chosen_as_the_reference_does(draws, seed):
    logits = logits_for(seed, len(draws))
    expected = [choose(row, draw) for row, draw in zip(logits.double().tolist(), draws, strict=True)]
    assert sample(logits, draws) == expected


@settings(deadline=None, max_examples=200)
@given(draw=DRAWS, seed=SEEDS)
def test_what_top_k_and_top_p_leave(draw, seed):
    assume(draw.params.temperature > 0)
    logits = logits_for(seed, 1)
    kept = keep_likely(logits, [draw.params])[0].isfinite().nonzero().flatten().tolist()
    assert kept == sorted(likely(logits[0].double().tolist(), draw.params))


@settings(deadline=None)
@given(draw=DRAWS)
def test_the_noise_is_what_the_formula_says(draw):
    expected = torch.tensor([noise_of(i, draw) for i in range(9)], dtype=torch.float64)
    torch.testing.assert_close(gumbel_noise(9, draw, CPU), expected, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(draws=BATCHES, seed=SEEDS, order=st.randoms(use_true_random=False))
def test_a_token_does_not_depend_on_its_batch(draws, seed, order):
    logits = logits_for(seed, len(draws))
    together = sample(logits, draws)
    assert [sample(logits[i : i + 1], [draw])[0] for i, draw in enumerate(draws)] == together
    shuffled = order.sample(range(len(draws)), len(draws))
    assert sample(logits[shuffled], [draws[i] for i in shuffled]) == [together[i] for i in shuffled]


def test_sampling_leaves_the_logits_alone():
    logits = logits_for(1, 1)
    before = logits.clone()
    sample(logits, [Draw(SamplingParams(min_tokens=5, top_k=3), 0, 0, (1, 2))])
    assert torch.equal(logits, before)


# -- noise ------------------------------------------------------------------------------------------------------------

BASE = Draw(SamplingParams(seed=5, choice=1), position=9, generated=0, stop_ids=())


def params(**changes) -> Draw:
    return dataclasses.replace(BASE, params=dataclasses.replace(BASE.params, **changes))


@pytest.mark.parametrize(
    "other",
    [
        params(seed=6),
        params(seed=5 + 2**32),
        params(choice=2),
        dataclasses.replace(BASE, position=10),
        dataclasses.replace(BASE, position=9 + 2**32),
    ],
)
def test_every_part_of_the_key_changes_all_noise(other):
    assert not set(gumbel_noise(101, BASE, CPU).tolist()) & set(gumbel_noise(101, other, CPU).tolist())


def test_nothing_else_changes_the_noise():
    other = Draw(
        dataclasses.replace(BASE.params, temperature=0.3, max_tokens=7, top_k=4), 9, generated=3, stop_ids=(1,)
    )
    assert torch.equal(gumbel_noise(101, BASE, CPU), gumbel_noise(101, other, CPU))
    assert torch.equal(gumbel_noise(101, BASE, CPU)[:50], gumbel_noise(50, BASE, CPU))


def chi_square(tokens: list[int], probabilities: list[float]) -> float:
    counts = Counter(tokens)
    assert set(counts) <= {i for i, p in enumerate(probabilities) if p > 0}, "a barred token was drawn"
    expected = [(counts[i], p * len(tokens)) for i, p in enumerate(probabilities) if p > 0]
    return sum((seen - want) ** 2 / want for seen, want in expected)


CHI_SQUARE_5_DF = 35.9  # exceeded with probability 1e-6
TRIALS = 1500


@pytest.mark.parametrize("along", ["position", "seed", "choice"])
def test_tokens_are_drawn_as_often_as_they_are_likely(along):
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.5])
    number = range(TRIALS)
    if along == "position":
        draws = [dataclasses.replace(BASE, position=i) for i in number]
    else:
        draws = [params(**{along: i}) for i in number]
    tokens = sample(logits.expand(TRIALS, -1), draws)
    assert chi_square(tokens, logits.softmax(0).tolist()) < CHI_SQUARE_5_DF
    skewed = (logits * 1.2).softmax(0).tolist()
    assert chi_square(tokens, skewed) > CHI_SQUARE_5_DF, "too few trials to see a temperature of 0.83"


def test_top_k_and_top_p_keep_the_shares_of_what_is_left():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.5])
    draws = [
        Draw(SamplingParams(seed=3, temperature=0.7, top_k=4, top_p=0.93), position=i, generated=0, stop_ids=())
        for i in range(TRIALS)
    ]
    scores = (logits / 0.7).exp()
    kept = [1, 3, 4]  # top_k leaves 4, 1, 3, 0; of these the first three reach 0.93 of the weight
    assert scores[[4, 1]].sum() < 0.93 * scores[[4, 1, 3, 0]].sum() < scores[[4, 1, 3]].sum()
    shares = [float(scores[i] / scores[kept].sum()) if i in kept else 0.0 for i in range(6)]
    assert chi_square(sample(logits.expand(TRIALS, -1), draws), shares) < CHI_SQUARE_5_DF


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-38, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = logits_for(2, 8)
    draws = [Draw(SamplingParams(temperature=temperature, seed=i, top_p=0.9), i, 0, ()) for i in range(8)]
    assert sample(logits, draws) == logits.argmax(1).tolist()
