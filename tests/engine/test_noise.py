"""The generator against its published vectors, the noise against its formula, and a draw against its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import ONES, noise_of, philox_in_integers

from kvferry.engine.sampling import philox as module
from kvferry.engine.sampling.likely import compact
from kvferry.engine.sampling.philox import MASK32, Keys, bits_of, bits_of_all, gumbel, philox
from kvferry.engine.sampling.race import HOPELESS, draw_among, draw_from_all

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
WORD = st.integers(0, ONES)


def run_philox(counter, key):
    """By tensors and by arrays, with and without buffers."""
    answers = []
    for make in (torch.tensor, np.array):
        for buffers in (None, [[make([-1]) for _ in range(4)] for _ in range(2)]):
            answers.append([word.item() for word in philox([make([word]) for word in counter], key, buffers)])
    assert answers.count(answers[0]) == 4
    return answers[0]


def keys_of(*rows: tuple[int, int, int]) -> Keys:
    """A row for each seed, choice and position."""
    halves = [(s & MASK32, s >> 32, p & MASK32, p >> 32, c) for s, c, p in rows]
    return Keys(*[torch.tensor(column)[:, None] for column in zip(*halves, strict=True)])


def noise(vocab: int, seed: int = 5, choice: int = 1, position: int = 9) -> torch.Tensor:
    return gumbel(bits_of(torch.arange(vocab)[None], keys_of((seed, choice, position))))[0]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert run_philox(counter, key) == answer


@settings(deadline=None)
@given(counter=st.lists(WORD, min_size=4, max_size=4), key=st.tuples(WORD, WORD))
def test_philox_for_any_counter(counter, key):
    assert run_philox(counter, key) == philox_in_integers(counter, key)


ROWS = st.lists(st.tuples(st.integers(0, 2**64 - 1), WORD, st.integers(0, 2**40)), min_size=1, max_size=4)


@settings(deadline=None)
@given(rows=ROWS, lanes=st.integers(1, 9), piece=st.integers(1, 30))
def test_the_bits_of_many_rows_are_those_of_each(rows, lanes, piece):
    expected = [
        [word for i in range(lanes) for word in philox_in_integers([i, p & ONES, p >> 32, c], (s & ONES, s >> 32))]
        for s, c, p in rows
    ]
    keys = keys_of(*rows)
    assert bits_of(torch.arange(4 * lanes).expand(len(rows), -1), keys).tolist() == expected
    buffers = torch.full((8 * len(rows) * lanes + 5,), -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        whole = bits_of_all(lanes, keys, buffers)
    assert whole.permute(1, 2, 0).reshape(len(rows), -1).tolist() == expected


@settings(deadline=None)
@given(seed=st.integers(0, 2**64 - 1), choice=WORD, position=st.integers(0, 2**40))
def test_the_noise_is_what_the_formula_says(seed, choice, position):
    expected = torch.tensor([noise_of(i, seed, choice, position) for i in range(9)], dtype=torch.float64)
    torch.testing.assert_close(noise(9, seed, choice, position), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "other", [{"seed": 6}, {"seed": 5 + 2**32}, {"choice": 2}, {"position": 10}, {"position": 9 + 2**32}]
)
def test_every_part_of_the_key_changes_all_noise(other):
    assert not set(noise(101).tolist()) & set(noise(101, **other).tolist())


def test_a_tokens_noise_is_the_same_bits_wherever_it_is_computed():
    whole = noise(1001)
    assert torch.equal(whole[:50], noise(50))
    alone = torch.cat([gumbel(bits_of(torch.tensor([[i]]), keys_of((5, 1, 9))))[0] for i in range(0, 1001, 7)])
    assert torch.equal(whole[::7], alone)


# -- the race ---------------------------------------------------------------------------------------------------------


def winners(scores: torch.Tensor, keys: Keys) -> list[int]:
    """The definition: the argmax of score + noise, of equals the first."""
    return (
        (scores.double() + gumbel(bits_of(torch.arange(scores.shape[1]).expand(scores.shape), keys))).argmax(1).tolist()
    )


def race(scores: torch.Tensor, keys: Keys) -> list[list[int]]:
    """Both ways to run it."""
    buffers = torch.empty(8 * len(scores) * -(-scores.shape[1] // 4), dtype=torch.int64)
    among = draw_among(*compact(scores, torch.full_like(scores[:, :1], HOPELESS)), keys)
    return [draw_from_all(scores, keys, buffers).tolist(), among.tolist()]


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 5),
    vocab=st.sampled_from([1, 2, 3, 4, 5, 41, 1023, 5000]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 9.0, 1e4]),
    barred=st.sampled_from([0.0, 0.5, 0.99]),
)
def test_the_winner_is_the_argmax_of_score_and_noise(seed, rows, vocab, spread, barred):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocab, generator=generator) * spread
    scores.masked_fill_(torch.rand(rows, vocab, generator=generator) < barred, float("-inf"))
    scores[:, int(seed) % vocab] = scores.amax(1).clamp(min=0)
    scores -= scores.amax(1, keepdim=True)
    keys = keys_of(*[(seed + row, row, row * 2**33) for row in range(rows)])
    expected = winners(scores, keys)
    assert race(scores, keys) == [expected, expected]


def test_the_noise_at_its_ends_is_within_what_the_race_assumes():
    least, greatest = gumbel(torch.tensor([0, MASK32])).tolist()
    assert least - greatest > HOPELESS
    assert least == pytest.approx(-3.1303, abs=1e-3)
    assert greatest == pytest.approx(22.874, abs=1e-3)


@pytest.mark.parametrize("gap", [21.0, 22.0, 23.0, 26.0])
def test_a_far_token_wins_as_often_as_it_should(gap):
    """Where one token has nearly all the weight, the noise of all others matters at its far end only."""
    scores = torch.full((40, 4096), -gap)
    scores[:, 77] = 0
    keys = keys_of(*[(row, 0, 5) for row in range(40)])
    expected = winners(scores, keys)
    assert race(scores, keys) == [expected, expected]


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_but_barred_tokens_gives_token_0(rows):
    scores = torch.full((rows, 9), float("-inf"))
    assert race(scores, keys_of(*[(row, 0, 1) for row in range(rows)])) == [[0] * rows] * 2
