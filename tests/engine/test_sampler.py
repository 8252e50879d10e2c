"""Sampling: each parameter and any mixture against a row-by-row reference in plain Python, and that nothing but the
draw itself decides."""

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sampling_reference import choose, kept
from torch.overrides import TorchFunctionMode

from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Draw
from kvferry.engine.sampling import likely
from kvferry.engine.sampling.likely import in_order, keep_likely, likeliest
from kvferry.engine.sampling.sampler import Sampler

VOCAB = 41
TOKEN = st.integers(0, VOCAB - 1)
VALUES = {
    "temperature": st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.9]),
    "top_p": st.sampled_from([1.0, 0.999, 0.91, 0.5, 0.13, 1e-6, 0.0]),
    "top_k": st.sampled_from([0, 1, 2, 5, 40, 41, 1000]),
    "min_p": st.sampled_from([0.0, 1e-6, 0.05, 0.4, 1.0]),
    "presence_penalty": st.sampled_from([0.0, 0.5, -2.0, 2.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.25, -1.0, 2.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.25, 0.5, 10.0]),
    "logit_bias": st.dictionaries(TOKEN, st.sampled_from([-100.0, -1.5, 0.5, 4.0, 100.0]), max_size=4).map(
        lambda bias: tuple(bias.items())
    ),
    "bad_words": st.lists(st.lists(TOKEN, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    "min_tokens": st.sampled_from([0, 3]),
}
PARAMS = st.builds(SamplingParams, **VALUES, seed=st.integers(0, 2**64 - 1), choice=st.integers(0, 3))
SEEDS = st.integers(0, 2**32)


@st.composite
def draws_with(draw, params):
    """A sequence of few different tokens, whose bad words often are about to be completed."""
    ids = draw(st.lists(st.sampled_from([0, 3, 7, 11, 40]), min_size=1, max_size=12))
    its = draw(params)
    if draw(st.booleans()):
        its = dataclasses.replace(its, bad_words=(*its.bad_words, (*ids[-2:], draw(TOKEN))))
    stop_ids = draw(st.sampled_from([(), (0,), (3, 7, 11)]))
    return Draw(its, stop_ids, ids, draw(st.integers(1, len(ids))))


BATCHES = st.lists(draws_with(PARAMS), min_size=1, max_size=6)


def logits_for(seed: int, rows: int, vocab: int = VOCAB, whole: bool = False) -> torch.Tensor:
    """`whole` ones are often equal."""
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return logits.round() if whole else logits


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    return Sampler().sample(logits, draws).tokens


def chosen(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    return [choose(row, draw) for row, draw in zip(logits.double().tolist(), draws, strict=True)]


@settings(deadline=None, max_examples=300)
@given(draws=BATCHES, seed=SEEDS, whole=st.booleans())
def test_each_row_is_chosen_as_the_reference_does(draws, seed, whole):
    logits = logits_for(seed, len(draws), whole=whole)
    assert sample(logits, draws) == chosen(logits, draws)


@pytest.mark.parametrize("name", VALUES)
@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=SEEDS, temperature=st.sampled_from([0.0, 0.8]))
def test_each_parameter_alone(name, data, seed, temperature):
    params = st.builds(SamplingParams, **{"temperature": st.just(temperature), "seed": SEEDS, name: VALUES[name]})
    draws = data.draw(st.lists(draws_with(params), min_size=1, max_size=3))
    logits = logits_for(seed, len(draws))
    assert sample(logits, draws) == chosen(logits, draws)


@settings(deadline=None, max_examples=200)
@given(draws=BATCHES, seed=SEEDS, whole=st.booleans())
def test_what_top_k_and_top_p_leave(draws, seed, whole):
    draws = [draw for draw in draws if draw.params.temperature > 0]
    assume(draws)
    logits = logits_for(seed, len(draws), whole=whole)
    params = [dataclasses.replace(draw.params, min_p=0.0) for draw in draws]
    scores = logits - logits.amax(1, keepdim=True)
    scores /= torch.tensor([[p.temperature] for p in params])
    top_k = torch.tensor([[p.top_k if 0 < p.top_k < VOCAB else VOCAB] for p in params])
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64)
    tokens, left = keep_likely(scores, top_k, top_p)
    for row, its in enumerate(params):
        expected, _ = kept(logits[row].double().tolist(), its)
        assert tokens[row][left[row] > float("-inf")].tolist() == expected
        assert torch.equal(left[row, : len(expected)], scores[row, expected])


def test_an_order_is_by_score_and_then_by_token():
    scores = torch.tensor([[0.0, -1.0, -0.0, float("-inf"), -1.0, 2.0, 1e-45, -1e-45]])
    tokens, ordered = in_order(torch.arange(8)[None], scores)
    assert tokens.tolist() == [[5, 6, 0, 2, 7, 1, 4, 3]]
    assert ordered.tolist() == scores[0, tokens].tolist()
    assert likeliest(torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0], [0.0] * 5]), 4).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


# -- nothing but the draw decides -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(draws=BATCHES, seed=SEEDS, whole=st.booleans(), order=st.randoms(use_true_random=False))
def test_a_token_does_not_depend_on_its_batch(draws, seed, whole, order):
    logits = logits_for(seed, len(draws), whole=whole)
    sampler = Sampler()
    together = sampler.sample(logits, draws).tokens
    assert [sampler.sample(logits[i : i + 1], [draw]).tokens[0] for i, draw in enumerate(draws)] == together
    shuffled = order.sample(range(len(draws)), len(draws))
    assert sampler.sample(logits[shuffled], [draws[i] for i in shuffled]).tokens == [together[i] for i in shuffled]
    assert sampler.sample(logits.T.contiguous().T, draws).tokens == together
    assert sampler.sample(logits.double(), draws).tokens == together


@settings(deadline=None, max_examples=50)
@given(draws=BATCHES, seed=SEEDS, leaves=st.lists(st.integers(0, 5), max_size=6))
def test_what_a_sampler_has_seen_does_not_matter(draws, seed, leaves):
    """Sequences grow and go; the one sampler of all steps gives what a new one gives in each."""
    sampler = Sampler()
    for step, leave in enumerate(leaves):
        logits = logits_for(seed + step, len(draws))
        tokens = sampler.sample(logits, draws).tokens
        assert tokens == sample(logits, [dataclasses.replace(draw) for draw in draws])
        for draw, token in zip(draws, tokens, strict=True):
            draw.token_ids.append(token)
        if leave < len(draws) > 1:
            del draws[leave]


def test_a_batch_of_many_blocks_is_each_row_alone(monkeypatch):
    vocab, rows = 1999, 150
    monkeypatch.setattr(likely, "CACHED_LOGITS", 3 * vocab)
    mixture = [
        {"temperature": 0.0}, {}, {"top_k": 40}, {"top_p": 0.9}, {"temperature": 0.1}, {"min_p": 0.02, "top_p": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.3}, {"top_k": 3, "top_p": 0.8, "frequency_penalty": 0.7},
        {"presence_penalty": 1.5, "logit_bias": ((5, 3.0), (1998, 2.0))}, {"min_p": 0.3}, {"top_k": 2, "top_p": 0.3},
        {"temperature": 1.8, "top_p": 0.99}, {"temperature": 1.9}, {"temperature": 0.0, "logit_bias": ((7, 9.0),)},
    ]  # fmt: skip
    logits = logits_for(3, rows, vocab)
    draws = [
        Draw(SamplingParams(seed=row, logprobs=1, **mixture[row % len(mixture)]), (), [row, *range(0, 1900, 20)], 30)
        for row in range(rows)
    ]
    together = Sampler().sample(logits, draws)
    alone = [Sampler().sample(logits[row : row + 1], [draw]) for row, draw in enumerate(draws)]
    assert [one.tokens[0] for one in alone] == together.tokens
    assert [one.logprobs[0] for one in alone] == together.logprobs
    assert len(set(together.tokens)) > 60


def test_sampling_leaves_the_logits_alone():
    logits = logits_for(1, 4)
    before = logits.clone()
    rows = [{"min_tokens": 5, "top_k": 3}, {"logit_bias": ((1, 5.0),), "temperature": 0.0}, {}, {"top_p": 0.5}]
    Sampler().sample(logits, [Draw(SamplingParams(logprobs=2, **its), (1, 2), [0], 1) for its in rows])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_smaller_dtype_are_their_float32_values(dtype):
    logits = logits_for(7, 12).to(dtype)
    draws = [Draw(SamplingParams(seed=i, temperature=i % 3, logprobs=1), (), [i], 1) for i in range(12)]
    assert Sampler().sample(logits, draws) == Sampler().sample(logits.float(), draws)


# Tokens that were drawn when this was first written. A request that is moved or retried between versions, too, shall
# go on with the tokens it would have had.
PINNED = [
    ({}, 1, 788), ({}, 2, 636), ({"choice": 1}, 2, 121), ({"temperature": 0.5}, 7, 695),
    ({"temperature": 0.9, "choice": 2, "top_k": 20}, 40, 708), ({"top_p": 0.8}, 300, 839),
    ({"temperature": 2.0, "choice": 3}, 9, 178), ({"temperature": 0.1, "top_k": 5, "top_p": 0.5}, 5, 354),
]  # fmt: skip


def test_tokens_stay_what_they_were():
    logits = torch.linspace(-2, 2, 1000)[torch.arange(1000) * 387 % 1000].expand(len(PINNED), -1)
    draws = [Draw(SamplingParams(seed=20261120, **its), (), [0] * position, 1) for its, position, _ in PINNED]
    assert sample(logits, draws) == [token for _, _, token in PINNED]


# -- what it costs ----------------------------------------------------------------------------------------------------


class Calls(TorchFunctionMode):
    """Counts the torch functions that are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def calls(params: list[dict], times: int = 1) -> list[str]:
    """Those of a step after the first, of these rows so many times over."""
    draws = [Draw(SamplingParams(seed=i, **its), (7,), [1, 2, 3, 4], 2) for i, its in enumerate(params * times)]
    logits, sampler = logits_for(1, len(draws)), Sampler()
    sampler.sample(logits, draws)
    with Calls() as counted:
        sampler.sample(logits, draws)
    return [name for name in counted.names if not name.startswith("__get")]


def test_greedy_rows_cost_an_argmax():
    greedy = [{"temperature": 0.0, "max_tokens": 9, "top_p": 0.4, "top_k": 3}]
    assert calls(greedy, 20) == ["float", "numpy", "tolist"]


def test_more_rows_are_not_more_calls():
    mixture = [
        {"temperature": 0.0}, {}, {"top_k": 4, "min_p": 0.1}, {"top_p": 0.9}, {"logprobs": 2},
        {"presence_penalty": 1.0, "repetition_penalty": 2.0, "min_tokens": 50, "bad_words": ((3, 4, 5), (9,))},
    ]  # fmt: skip
    assert len(calls(mixture, 2)) == len(calls(mixture, 30))


# -- extreme values ---------------------------------------------------------------------------------------------------

MINUS = float("-inf")


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-12, 1e-38, 1e-45, 1e-300])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.5}])
def test_a_temperature_near_zero_is_greedy(temperature, filters):
    logits = logits_for(2, 8)
    draws = [Draw(SamplingParams(temperature=temperature, seed=i, **filters), (), [i], 1) for i in range(8)]
    assert sample(logits, draws) == logits.argmax(1).tolist()


WAYS = [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1, "temperature": 2.0}]


@pytest.mark.parametrize("way", WAYS)
def test_one_token_left_of_all(way):
    bars = tuple((token,) for token in range(VOCAB) if token != 17)
    draws = [Draw(SamplingParams(seed=i, bad_words=bars, **way), (), [1], 1) for i in range(5)]
    assert sample(logits_for(1, 5), draws) == [17] * 5
    barred = logits_for(1, 5)
    barred[:, :17] = barred[:, 18:] = MINUS
    assert sample(barred, [Draw(SamplingParams(seed=i, **way), (), [1], 1) for i in range(5)]) == [17] * 5


@pytest.mark.parametrize("way", WAYS)
def test_all_tokens_barred_gives_token_0(way):
    bars = tuple((token,) for token in range(VOCAB))
    draws = [Draw(SamplingParams(seed=i, bad_words=bars if i % 2 else (), **way), (), [1], 1) for i in range(6)]
    tokens = sample(logits_for(1, 6), draws)
    assert tokens[1::2] == [0] * 3
    assert tokens[::2] == sample(logits_for(1, 6)[::2], draws[::2])
    assert sample(torch.full((1, VOCAB), MINUS), draws[:1]) == [0]


@pytest.mark.parametrize("way", WAYS)
def test_logits_of_minus_infinity_are_never_chosen(way):
    logits = logits_for(4, 30)
    logits[:, 3:] = MINUS
    draws = [Draw(SamplingParams(seed=i, presence_penalty=2.0, **way), (), [0, 9, 1, 9], 1) for i in range(30)]
    assert set(sample(logits, draws)) <= {0, 1, 2}


@pytest.mark.parametrize("way", WAYS)
def test_a_logit_of_infinity_is_the_best(way):
    logits = logits_for(4, 5)
    logits[:, 23] = float("inf")
    assert sample(logits, [Draw(SamplingParams(seed=i, **way), (), [1], 1) for i in range(5)]) == [23] * 5


@pytest.mark.parametrize("way", WAYS)
def test_biases_of_a_hundred_decide(way):
    up = [Draw(SamplingParams(seed=i, logit_bias=((i, 100.0),), **way), (), [1], 1) for i in range(5)]
    assert sample(logits_for(6, 5), up) == [0, 1, 2, 3, 4]
    best = logits_for(6, 5).argmax(1).tolist()
    down = [Draw(SamplingParams(seed=i, logit_bias=((best[i], -100.0),), **way), (), [1], 1) for i in range(5)]
    assert all(token != barred for token, barred in zip(sample(logits_for(6, 5), down), best, strict=True))


def test_biases_of_one_token_add_up_and_unknown_tokens_are_left_out():
    params = SamplingParams(temperature=0.0, logit_bias=((5, 60.0), (5, 40.0), (6, 99.0), (VOCAB, 500.0)))
    assert sample(logits_for(6, 2), [Draw(params, (), [1], 1), Draw(SamplingParams(temperature=0.0), (), [1], 1)]) == [
        5,
        int(logits_for(6, 2)[1].argmax()),
    ]
    bars = SamplingParams(temperature=0.0, bad_words=((VOCAB,), (1, VOCAB)), min_tokens=5)
    assert sample(logits_for(6, 2), [Draw(bars, (VOCAB,), [1], 1)] * 2) == logits_for(6, 2).argmax(1).tolist()


@pytest.mark.parametrize(
    "changes",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"presence_penalty": -2.0, "frequency_penalty": -2.0}],
)
def test_what_was_not_generated_is_not_penalised(changes):
    logits = logits_for(8, 9)
    plain = [Draw(SamplingParams(seed=i), (), list(range(VOCAB)), VOCAB) for i in range(9)]
    penalised = [dataclasses.replace(d, params=dataclasses.replace(d.params, **changes)) for d in plain]
    assert sample(logits, penalised) == sample(logits, plain)


def test_repetition_divides_positive_logits_and_multiplies_others():
    logits = torch.tensor([[4.0, 3.0, -1.0, -3.0]] * 4)
    cases = [((2.0, [0], 1), 1), ((0.5, [1], 1), 1), ((4.0, [0, 1], 1), 0), ((9.0, [0, 0, 0], 2), 1)]
    draws = [Draw(SamplingParams(temperature=0.0, repetition_penalty=r), (), ids, n) for (r, ids, n), _ in cases]
    assert sample(logits, draws) == [token for _, token in cases]
    below = torch.tensor([[-4.0, -3.0, -9.0, -9.0]])
    assert sample(below, [Draw(SamplingParams(temperature=0.0, repetition_penalty=2.0), (), [1], 1)]) == [0]


@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 1e30])
@pytest.mark.parametrize("way", WAYS)
def test_an_absurd_repetition_penalty_has_an_answer(penalty, way):
    (token,) = sample(logits_for(3, 1), [Draw(SamplingParams(repetition_penalty=penalty, **way), (), [1, 2], 1)])
    assert 0 <= token < VOCAB


def test_bad_words_are_never_completed():
    words = ((4,), (1, 2), (9, 1, 3), (2, 2))
    logits = torch.tensor([[0.0, 1.0, 7.0, 6.0, 9.0, 5.0]])

    def best(*ids: int, prompt: int = 1) -> int:
        return sample(logits, [Draw(SamplingParams(temperature=0.0, bad_words=words), (), list(ids), prompt)])[0]

    assert best(5) == 2
    assert best(1) == 3, "the prompt counts"
    assert best(9, 1) == 5
    assert best(9, 1, prompt=2) == 5
    assert best(8, 1) == 3
    assert best(2) == 3
    assert best(3) == 2


def test_no_rows_give_no_tokens():
    sampler = Sampler()
    assert sampler.sample(torch.empty(0, VOCAB), []).tokens == []
    sampler.sample(logits_for(1, 1), [Draw(SamplingParams(), (), [1], 1)])
    assert sampler.sample(torch.empty(0, VOCAB), []).tokens == []


# -- how often --------------------------------------------------------------------------------------------------------


def chi_square(tokens: list[int], probabilities: list[float]) -> float:
    counts = Counter(tokens)
    assert set(counts) <= {i for i, p in enumerate(probabilities) if p > 0}, "a barred token was drawn"
    expected = [(counts[i], p * len(tokens)) for i, p in enumerate(probabilities) if p > 0]
    return sum((seen - want) ** 2 / want for seen, want in expected)


CHI_SQUARE_5_DF = 35.9  # exceeded with probability 1e-6
TRIALS = 1500
SIX = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.5])


@pytest.mark.parametrize("along", ["position", "seed", "choice"])
def test_tokens_are_drawn_as_often_as_they_are_likely(along):
    base = SamplingParams(seed=5, choice=1)
    if along == "position":
        draws = [Draw(base, (), [0] * i, 0) for i in range(TRIALS)]
    else:
        draws = [Draw(dataclasses.replace(base, **{along: i}), (), [0] * 9, 1) for i in range(TRIALS)]
    tokens = sample(SIX.expand(TRIALS, -1), draws)
    assert chi_square(tokens, SIX.softmax(0).tolist()) < CHI_SQUARE_5_DF
    skewed = (SIX * 1.2).softmax(0).tolist()
    assert chi_square(tokens, skewed) > CHI_SQUARE_5_DF, "too few trials to see a temperature of 0.83"


@pytest.mark.parametrize("filters", [{"top_k": 4, "top_p": 0.93}, {"min_p": 0.1}])
def test_filters_keep_the_shares_of_what_is_left(filters):
    params = SamplingParams(seed=3, temperature=0.7, **filters)
    draws = [Draw(params, (), [0] * i, 0) for i in range(TRIALS)]
    scores = (SIX / 0.7).exp()
    left = [1, 3, 4]
    # top_k leaves 4, 1, 3, 0; of these the first three reach 0.93 of the weight. min_p leaves the same three.
    assert scores[[4, 1]].sum() < 0.93 * scores[[4, 1, 3, 0]].sum() < scores[[4, 1, 3]].sum()
    assert scores[0] < 0.1 * scores[4] < scores[3]
    shares = [float(scores[i] / scores[left].sum()) if i in left else 0.0 for i in range(6)]
    assert chi_square(sample(SIX.expand(TRIALS, -1), draws), shares) < CHI_SQUARE_5_DF
