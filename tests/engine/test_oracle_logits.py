"""Our logits against transformers' own for every architecture, in one process: within 1e-4 of their standard deviation,
however the tokens are cut into rows and wherever their blocks lie. The mutants show that a wrong block or position
would be seen."""

import dataclasses
import json
import shutil

import pytest
import torch
from architectures import CONFIGS, SPECIALS, WINDOW
from oracle import Oracle
from paged_sequences import TOLERANCE, Paged, greedy, plan_of
from transformers import AutoModelForCausalLM

from kvferry.common.config import EngineConfig
from kvferry.engine.loading.model import load_model
from kvferry.engine.runner import Runner

WINDOWED = [arch for arch, told in SPECIALS.items() if "sliding_window" in told]
ONLY_WINDOWED = [arch for arch in WINDOWED if "layer_types" not in SPECIALS[arch]]


@pytest.fixture
def paged(arch, models, references):
    return lambda *lengths, **options: Paged(models[arch], references[arch], lengths, **options)


def of_every_architecture(test):
    return pytest.mark.parametrize("arch", CONFIGS)(test)


@pytest.mark.parametrize("length", [1, 16, 17, 90])
@of_every_architecture
def test_a_whole_prompt(paged, length):
    assert paged(length, seed=length).step(s0=length) < TOLERANCE


@pytest.mark.parametrize("chunks", [(7, 1, 13, 16, 3, 10), (16, 16, 16), (15, 1, 1, 15, 1), (33, 31, 2)])
@of_every_architecture
def test_a_prompt_in_chunks(paged, chunks):
    sequence = paged(sum(chunks))
    assert [off for chunk in chunks if (off := sequence.step(s0=chunk)) >= TOLERANCE] == []


@pytest.mark.parametrize("prompt", [1, 17])
@of_every_architecture
def test_token_by_token(paged, prompt):
    sequence = paged(prompt + 34)
    assert sequence.step(s0=prompt) < TOLERANCE
    assert max(sequence.step(s0=1) for _ in range(34)) < TOLERANCE


@pytest.mark.parametrize("after", [1, 17])
@of_every_architecture
def test_a_prefix_copied_from_another_pool(paged, after):
    sequences = paged(70, 40)
    assert sequences.step(s0=48, s1=20) < TOLERANCE
    sequences.pull_into_another_pool()
    assert sequences.done == [48, 16]
    assert sequences.step(s0=after, s1=4 + after) < TOLERANCE


@of_every_architecture
def test_a_ragged_batch(paged):
    """Whole prompts, chunks after a prefix and single tokens, in each other's company, over three steps."""
    batch = paged(40, 17, 16, 60, 33, 3, 90, 34)
    assert batch.step(s0=5, s3=32, s6=80, s7=33) < TOLERANCE
    assert batch.step(s4=33, s0=1, s1=16, s3=17, s2=15, s6=1, s7=1) < TOLERANCE
    assert batch.step(s6=9, s5=3, s3=11, s2=1, s1=1, s0=34) < TOLERANCE


@of_every_architecture
def test_greedy_tokens(arch, models, checkpoint_folders):
    prompt = [(37 * i + 11) % 256 for i in range(30)]
    assert Oracle(checkpoint_folders[arch]).refuses(prompt, greedy(models[arch], prompt, 24)) == ""


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


def test_rows_without_a_draw_are_looked_at_as_well(models):
    """Behind those that were asked for: whether they are numbers is all that matters."""
    model = models["llama"]
    runner = Runner(model, torch.full((4, *model.layout.shape), float("nan")))
    rows = [(i, [5 + i, 6, 7], 0, [i], i == 1) for i in range(3)]
    together = runner.logits(plan_of(rows))
    assert together.shape == (3, 300)
    for place, row in enumerate((1, 0, 2)):
        torch.testing.assert_close(together[place], runner.logits(plan_of(rows[row : row + 1]))[0])


# -- mutants: each must be seen, in the very next step, whether that is a chunk or a single token ---------------------
# They change block 2 of 3: its tokens 32 to 47 lie inside the window of the token at 48.


def swap_two_blocks(batch: Paged) -> None:
    """Of two sequences. Two that one token sees whole may lie either way round: attention is a sum over them, and
    keys carry their positions; `test_the_order_of_whole_blocks_is_no_matter` keeps that in mind."""
    one, two = batch.tables[0][2], batch.tables[1][2]
    batch.pool[[one, two]] = batch.pool[[two, one]]


def zero_a_block(batch: Paged) -> None:
    batch.pool[batch.tables[0][2]] = 0


def the_block_before_it(batch: Paged) -> None:
    batch.pool[batch.tables[0][2]] = batch.pool[batch.tables[0][1]]


def swap_keys_and_values(batch: Paged) -> None:
    block = batch.tables[0][2]
    batch.pool[block] = batch.pool[block].flip(2)


def one_token_of_one_head(batch: Paged) -> None:
    batch.pool[batch.tables[0][2], 0, :, :, 5] = batch.pool[batch.tables[0][2], 0, :, :, 6]


def one_layer(batch: Paged) -> None:
    batch.pool[batch.tables[0][2], :, -1] = batch.pool[batch.tables[0][1], :, -1]


MUTANTS = [
    swap_two_blocks,
    zero_a_block,
    the_block_before_it,
    swap_keys_and_values,
    one_token_of_one_head,
    one_layer,
]


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("mutant", MUTANTS)
@of_every_architecture
def test_a_wrong_block_is_seen(paged, mutant, count):
    batch = paged(60, 60)
    assert batch.step(s0=48, s1=48) < TOLERANCE
    mutant(batch)
    assert batch.step(s0=count) > 10 * TOLERANCE


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("shift", [-1, 1])
@of_every_architecture
def test_a_wrong_position_is_seen(paged, monkeypatch, count, shift):
    """Relative to the prefix for rotary positions; layers without positions stand beside others that have them."""
    from kvferry.engine import runner

    right = runner.lay_out

    def shifted(*what):
        inputs = right(*what)
        inputs.positions.add_(shift)
        return inputs

    sequence = paged(60)
    assert sequence.step(s0=48) < TOLERANCE
    monkeypatch.setattr(runner, "lay_out", shifted)
    assert sequence.step(s0=count) > 10 * TOLERANCE


@of_every_architecture
def test_a_block_that_was_never_written_is_seen(paged):
    """What is poisoned is really read when it should not be there: NaN reaches the logits."""
    sequence = paged(60)
    sequence.step(s0=48)
    sequence.pool[sequence.tables[0][2]] = float("nan")
    assert sequence.step(s0=1) == float("inf")


@pytest.mark.parametrize("arch", sorted(set(CONFIGS) - set(WINDOWED)))
def test_the_order_of_whole_blocks_is_no_matter(paged):
    sequence = paged(60)
    sequence.step(s0=48)
    one, two = sequence.tables[0][:2]
    sequence.pool[[one, two]] = sequence.pool[[two, one]]
    assert sequence.step(s0=9) < TOLERANCE


@pytest.mark.parametrize("change", [-1, 1, None])
@pytest.mark.parametrize("arch", WINDOWED)
def test_a_window_of_another_width_is_seen(paged, models, arch, change, monkeypatch):
    for part in models[arch].module.modules():
        if getattr(part, "sliding_window", None) is not None:
            monkeypatch.setattr(part, "sliding_window", change and WINDOW + change)
    if getattr(models[arch].module.config, "sliding_window", None) is not None:
        monkeypatch.setattr(models[arch].module.config, "sliding_window", change and WINDOW + change)
    assert paged(60).step(s0=60) > 10 * TOLERANCE


@pytest.mark.parametrize("arch", ONLY_WINDOWED)
def test_blocks_behind_every_window_are_not_read(paged):
    sequence = paged(60)
    sequence.step(s0=48)
    sequence.pool[sequence.tables[0][0]] = float("nan")
    assert sequence.step(s0=9) < TOLERANCE


def leave_out(monkeypatch, name: str) -> None:
    """Have paged attention not heed one of its keywords."""
    from kvferry.kernels.cpu_attention import CpuAttention

    right = CpuAttention.attend
    monkeypatch.setattr(
        CpuAttention, "attend", lambda *what: right(*what[:-1], dataclasses.replace(what[-1], **{name: None}))
    )


@pytest.mark.parametrize(("arch", "name"), [("gemma2", "softcap"), ("gpt_oss", "sinks")])
@pytest.mark.parametrize("count", [1, 9])
def test_what_only_some_have_is_seen_when_left_out(paged, arch, name, count, monkeypatch):
    sequence = paged(60)
    assert sequence.step(s0=48) < TOLERANCE
    leave_out(monkeypatch, name)
    assert sequence.step(s0=count) > 10 * TOLERANCE
