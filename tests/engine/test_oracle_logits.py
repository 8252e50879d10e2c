"""Our logits against transformers' own, in one process: within 1e-4 of their standard deviation, however the tokens are
cut into rows and wherever their blocks lie. The mutants show that a wrong block or position would be seen."""

import json
import shutil

import pytest
import torch
from checkpoints import ARCHITECTURES
from transformers import AutoModelForCausalLM

from kvferry.common.config import EngineConfig
from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Draw, Row, StepPlan
from kvferry.engine.model import load_model
from kvferry.engine.runner import Runner

TOLERANCE = 1e-4
BLOCK = 16
ANY_DRAW = Draw(SamplingParams(), 0, 0, ())


class Paged:
    """Sequences of one model in a pool that holds NaN wherever nothing was written, at blocks in random order."""

    def __init__(self, model, reference, lengths, seed=0, num_blocks=40):
        generator = torch.Generator().manual_seed(seed)
        print(f"seed {seed}")
        self.pool = torch.full((num_blocks, *model.layout.shape), float("nan"))
        self._runner = Runner(model, self.pool)
        self.tokens = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]
        order = iter(torch.randperm(num_blocks, generator=generator).tolist())
        self.tables = [[next(order) for _ in range(-(-length // BLOCK))] for length in lengths]
        self._done = [0] * len(lengths)
        self._expected = []
        with torch.inference_mode():
            for tokens in self.tokens:
                ids = torch.tensor([tokens])
                self._expected.append(reference(ids, attention_mask=torch.ones_like(ids)).logits[0])

    def step(self, **counts: int) -> float:
        """Compute the next `s0=3` tokens of sequence 0, and so on, in one forward. How far the logits after each row's
        last token are from the reference's, in deviations of those."""
        rows, expected = [], []
        for key, count in counts.items():
            index = int(key[1:])
            start, end = self._done[index], self._done[index] + count
            tokens = tuple(self.tokens[index][start:end])
            assert len(tokens) == count
            rows.append(Row(index, tokens, start, tuple(self.tables[index]), ANY_DRAW))
            expected.append(self._expected[index][end - 1])
            self._done[index] = end
        got, want = self._runner.logits(StepPlan(tuple(rows))), torch.stack(expected)
        assert got.shape == want.shape
        off = ((got - want).abs().amax(1) / want.std(dim=1)).nan_to_num(nan=float("inf"))
        return off.max().item()


@pytest.fixture(params=ARCHITECTURES)
def paged(request, models, references):
    return lambda *lengths, **options: Paged(models[request.param], references[request.param], lengths, **options)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 200])
def test_a_whole_prompt(paged, length):
    assert paged(length, seed=length).step(s0=length) < TOLERANCE


@pytest.mark.parametrize("chunks", [(7, 1, 13, 16, 3, 10), (16, 16, 16), (15, 1, 1, 15, 1), (1, 48), (33, 31, 2)])
def test_a_prompt_in_chunks(paged, chunks):
    sequence = paged(sum(chunks))
    assert [off for chunk in chunks if (off := sequence.step(s0=chunk)) >= TOLERANCE] == []


@pytest.mark.parametrize("prompt", [1, 15, 16, 17])
def test_token_by_token(paged, prompt):
    sequence = paged(prompt + 34)
    assert sequence.step(s0=prompt) < TOLERANCE
    assert max(sequence.step(s0=1) for _ in range(34)) < TOLERANCE


def test_a_ragged_batch(paged):
    """Whole prompts, chunks after a prefix and single tokens, in each other's company, over three steps."""
    batch = paged(40, 17, 16, 60, 33, 3, 90, 34)
    assert batch.step(s0=5, s3=32, s6=80, s7=33) < TOLERANCE
    assert batch.step(s4=33, s0=1, s1=16, s3=17, s2=15, s6=1, s7=1) < TOLERANCE
    assert batch.step(s6=9, s5=3, s3=11, s2=1, s1=1, s0=34) < TOLERANCE


@pytest.mark.parametrize("changes", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_the_models_own_scaling(checkpoint_folders, tmp_path, monkeypatch, changes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = shutil.copytree(checkpoint_folders["gpt2"], tmp_path / "scaled")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    model = load_model(EngineConfig(model=str(folder), device="cpu", threads=1), lambda *_: None)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    sequence = Paged(model, reference, [40])
    assert sequence.step(s0=33) < TOLERANCE
    assert sequence.step(s0=1) < TOLERANCE


def test_rows_without_a_draw_give_no_logits(models):
    model = models["llama"]
    runner = Runner(model, torch.full((4, *model.layout.shape), float("nan")))
    rows = [Row(i, (5, 6, 7), 0, (i,), draw) for i, draw in enumerate([None, ANY_DRAW, None])]
    assert runner.logits(StepPlan(tuple(rows))).shape == (1, 300)
    assert [token is None for token in runner.execute(StepPlan(tuple(rows)))] == [True, False, True]
    assert runner.execute(StepPlan((rows[0],))) == [None]


# -- mutants: each must be seen, in the very next step, whether that is a chunk or a single token ---------------------


def swap_two_blocks(batch: Paged) -> None:
    """Of two sequences. Two that one token sees whole may lie either way round: attention is a sum over them, and
    keys carry their positions; `test_the_order_of_whole_blocks_is_no_matter` keeps that in mind."""
    one, two = batch.tables[0][1], batch.tables[1][1]
    batch.pool[[one, two]] = batch.pool[[two, one]]


def zero_a_block(batch: Paged) -> None:
    batch.pool[batch.tables[0][1]] = 0


def the_block_before_it(batch: Paged) -> None:
    batch.pool[batch.tables[0][1]] = batch.pool[batch.tables[0][0]]


def swap_keys_and_values(batch: Paged) -> None:
    block = batch.tables[0][1]
    batch.pool[block] = batch.pool[block].flip(2)


def one_token_of_one_head(batch: Paged) -> None:
    batch.pool[batch.tables[0][1], 0, :, :, 5] = batch.pool[batch.tables[0][1], 0, :, :, 6]


MUTANTS = [swap_two_blocks, zero_a_block, the_block_before_it, swap_keys_and_values, one_token_of_one_head]


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_block_is_seen(paged, mutant, count):
    batch = paged(60, 60)
    assert batch.step(s0=48, s1=48) < TOLERANCE
    mutant(batch)
    assert batch.step(s0=count) > 10 * TOLERANCE


def test_the_order_of_whole_blocks_is_no_matter(paged):
    sequence = paged(60)
    sequence.step(s0=48)
    one, two = sequence.tables[0][:2]
    sequence.pool[[one, two]] = sequence.pool[[two, one]]
    assert sequence.step(s0=9) < TOLERANCE


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_wrong_position_is_seen(paged, monkeypatch, count, shift):
    from kvferry.engine import runner

    right = runner.lay_out

    def shifted(*what):
        tokens, positions, batch = right(*what)
        return tokens, positions + shift, batch

    sequence = paged(60)
    assert sequence.step(s0=48) < TOLERANCE
    monkeypatch.setattr(runner, "lay_out", shifted)
    assert sequence.step(s0=count) > 10 * TOLERANCE


def test_a_block_that_was_never_written_is_seen(paged):
    """What is poisoned is really read when it should not be there: NaN reaches the logits."""
    sequence = paged(60)
    sequence.step(s0=48)
    sequence.pool[sequence.tables[0][0]] = float("nan")
    assert sequence.step(s0=1) == float("inf")
