"""Checkpoints as people have them: sharded, in half precision, in the hub's cache, tied or not, broken."""

import json
import shutil
from statistics import median

import huggingface_hub.constants
import pytest
import torch
from architectures import CONFIGS
from checkpoints import tiny_checkpoint
from paged_sequences import TOLERANCE, Paged
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError, IncompatibleNode
from kvferry.engine.loading.checkpoint import read_config
from kvferry.engine.loading.files import weight_files
from kvferry.engine.loading.fingerprint import fingerprint_of
from kvferry.engine.loading.model import load_model
from kvferry.kernels.packed_linear import PackedLinear, can_pack

INDEX = "model.safetensors.index.json"
HALVES = ("bfloat16", "float16")
# How far a row's logits may be from fp32's, in deviations, in half of the rows: now and then a router, rounded, picks
# another expert. About three times the worst that was seen.
ROUNDED = {"bfloat16": 0.4, "float16": 0.05}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sharded_once(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("sharded"), "llama", shard_size="200KB")


@pytest.fixture
def sharded(sharded_once, tmp_path):
    """The llama checkpoint in several files, to be changed."""
    return shutil.copytree(sharded_once, tmp_path / "sharded")


@pytest.fixture
def whole(checkpoint_folders, tmp_path):
    """The same in one file, to be changed."""
    return shutil.copytree(checkpoint_folders["llama"], tmp_path / "whole")


def load(model, **options):
    options = {"device": "cpu", "threads": 1, **options}
    return load_model(EngineConfig(model=str(model), **options), lambda *_: None)


def fingerprint(folder) -> bytes:
    return fingerprint_of(folder, read_config(folder), "float32", lambda *_: None)


def change(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(model, kind=ConfigError, **options) -> str:
    with pytest.raises(kind) as caught:
        load(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- shards -----------------------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_is_the_same_model(sharded, references):
    assert len(weight_files(sharded)) > 2
    assert Paged(load(sharded), references["llama"], [40]).step(s0=40) < TOLERANCE


def test_every_shard_counts_in_the_fingerprint(sharded):
    seen = {fingerprint(sharded)}
    for path in weight_files(sharded):
        tensors = load_file(path)
        next(iter(tensors.values())).view(torch.uint8).flatten()[0] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})
        seen.add(fingerprint(sharded))
    assert len(seen) == 1 + len(weight_files(sharded))


def test_other_files_beside_the_shards_do_not(sharded):
    before = fingerprint(sharded)
    shutil.copy(weight_files(sharded)[0], sharded / "consolidated.safetensors")
    assert fingerprint(sharded) == before


def test_a_shard_that_is_missing(sharded):
    path = weight_files(sharded)[1]
    path.unlink()
    assert refusal(sharded) == f"{sharded / INDEX} names {path.name}, which is not there"


def test_a_shard_in_anothers_place(sharded):
    first, second, *_ = weight_files(sharded)
    shutil.copy(first, second)
    assert f"{second} lacks " in refusal(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_a_broken_index(sharded, content):
    (sharded / INDEX).write_text(content)
    assert str(sharded / INDEX) in refusal(sharded)


# -- broken and incomplete weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_weights_cut_short(whole, keep):
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is not a whole safetensors file" in refusal(whole)


def test_weights_that_are_something_else(whole):
    path = whole / "model.safetensors"
    path.write_bytes(b"<html>" * 1000)
    assert f"{path} is not a whole safetensors file" in refusal(whole)


def test_a_tensor_that_is_not_there(whole):
    path = whole / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert refusal(whole).endswith("lacks 1 of the model's tensors, such as model.layers.1.mlp.up_proj.weight")


def test_quantized_weights(whole):
    change(whole / "config.json", quantization_config={"quant_method": "mxfp4"})
    assert "its weights are quantized (mxfp4)" in refusal(whole, IncompatibleNode)


def test_tensors_that_nobody_needs(whole, caplog):
    """A config that was changed by hand serves half a model: it may be meant, so it is only said."""
    change(whole / "config.json", num_hidden_layers=1)
    load(whole)
    assert "tensors that its config has no use for, such as model.layers.1." in caplog.text


def test_a_tensor_of_another_shape(whole):
    change(whole / "config.json", intermediate_size=96)
    assert f"{whole} cannot be loaded" in refusal(whole)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "no such thing"}'])
def test_a_broken_config(whole, content):
    (whole / "config.json").write_text(content)
    assert "holds no usable config.json" in refusal(whole)


def test_a_broken_generation_config(whole):
    (whole / "generation_config.json").write_text("{")
    assert "holds no usable generation_config.json" in refusal(whole)


def test_code_of_a_checkpoints_own_is_not_run(whole):
    told = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    change(whole / "config.json", **told)
    (whole / "evil.py").write_text("raise SystemExit('it ran')")
    assert "holds no usable config.json" in refusal(whole)


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("arch", CONFIGS)
def test_half_precision(checkpoint_folders, references, arch, dtype):
    model = load(checkpoint_folders[arch], dtype=dtype)
    assert model.layout.dtype == dtype
    assert model.module.dtype == getattr(torch, dtype)
    batch = Paged(model, references[arch], [60, 40, 50, 20, 33])
    before = batch.errors(s0=48, s1=39, s2=17, s3=20, s4=33)
    batch.pull_into_another_pool()
    after = batch.errors(s0=1, s1=8, s2=9, s3=4, s4=1)
    assert max(map(median, (before, after))) < ROUNDED[dtype]


@pytest.mark.parametrize("dtype", HALVES)
def test_auto_is_the_checkpoints_own_dtype(tmp_path, references, dtype):
    folder = tiny_checkpoint(tmp_path / "half", "qwen2", dtype=dtype)
    model = load(folder)
    assert (model.layout.dtype, model.module.dtype) == (dtype, getattr(torch, dtype))
    assert load(folder, dtype="float32").layout.dtype == "float32"
    assert load(folder, dtype="float32").fingerprint != model.fingerprint
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert Paged(load(folder, dtype="float32"), reference, [40]).step(s0=40) < TOLERANCE


def test_weights_that_overflow_in_half_precision(whole):
    path = whole / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] *= 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    assert "not numbers in layer 0; try another --dtype than float16" in refusal(
        whole, IncompatibleNode, dtype="float16"
    )
    assert load(whole, dtype="bfloat16").layout.dtype == "bfloat16"


# -- packed and tied --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", CONFIGS)
def test_linear_layers_are_packed_and_nothing_else_is(models, arch):
    """Experts and routers are parameters of their own, and stay as they are. The models of the oracle's tests are
    these."""
    assert can_pack(torch.device("cpu"), torch.float32)
    kinds = {name: type(part).__name__ for name, part in models[arch].module.named_modules()}
    assert [name for name, kind in kinds.items() if kind in ("Linear", "Conv1D")] == []
    assert sum(kind == PackedLinear.__name__ for kind in kinds.values()) > 2 * models[arch].layout.layers
    moe = [name for name, kind in kinds.items() if kind.endswith("Experts")]
    assert bool(moe) == (arch in ("qwen3_moe", "mixtral", "gpt_oss"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_tied_or_not(tmp_path, arch, tied):
    folder = tiny_checkpoint(tmp_path / "model", arch, tie_word_embeddings=tied)
    stored = {name for file in weight_files(folder) for name in load_file(file)}
    assert ("lm_head.weight" in stored) == (not tied)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert Paged(load(folder), reference, [33]).step(s0=33) < TOLERANCE


# -- the hub's cache --------------------------------------------------------------------------------------------------

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def hub(checkpoint_folders, tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out, and no network: `org/name` with two commits, branch `main` at the
    first, tag `v2` at the second, which has another norm."""
    cache = tmp_path / "hub"
    root = cache / "models--org--name"
    for commit, name in ((FIRST, "main"), (SECOND, "v2")):
        shutil.copytree(checkpoint_folders["llama"], root / "snapshots" / commit)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / name).write_text(commit)
    change(root / "snapshots" / SECOND / "config.json", rms_norm_eps=1e-2)
    # huggingface_hub reads its environment when it is imported, so the switches themselves are turned.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return root


def test_a_hub_id_without_a_network(hub, checkpoint_folders):
    assert load("org/name").fingerprint == load(checkpoint_folders["llama"]).fingerprint


@pytest.mark.parametrize(("revision", "commit"), [("main", FIRST), ("v2", SECOND), (FIRST, FIRST), (SECOND, SECOND)])
def test_a_revision(hub, revision, commit):
    assert load("org/name", revision=revision).fingerprint == load(hub / "snapshots" / commit).fingerprint


def test_a_revision_that_is_not_in_the_cache(hub):
    assert "at revision v3" in refusal("org/name", revision="v3")


def test_a_revision_of_a_folder(whole):
    assert refusal(whole, revision="v2") == f"--revision v2 is for models of the hub, and {whole} is a folder"


def test_an_interrupted_download(hub):
    (hub / "snapshots" / FIRST / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refusal("org/name")
