"""Loading: what cannot be served is refused in one sentence, and the fingerprint changes exactly when the KV would."""

import json
import os
import shutil

import huggingface_hub.constants
import pytest
import torch
from architectures import CONFIGS

from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError
from kvferry.engine.loading import fingerprint as fingerprinting
from kvferry.engine.loading.checkpoint import read_config
from kvferry.engine.loading.fingerprint import fingerprint_of
from kvferry.engine.loading.model import load_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(checkpoint_folders, tmp_path):
    """A copy of the llama checkpoint, to be changed."""
    return shutil.copytree(checkpoint_folders["llama"], tmp_path / "model")


def load(folder, **options):
    return load_model(EngineConfig(model=str(folder), **{"device": "cpu", "threads": 1, **options}), lambda *_: None)


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def fingerprint(folder, dtype="float32") -> bytes:
    return fingerprint_of(folder, read_config(folder), dtype, lambda *_: None)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_the_config_says(models):
    llama, gpt2 = models["llama"], models["gpt2"]
    assert (llama.layout.kv_heads, llama.layout.layers, llama.layout.head_dim) == (2, 3, 16)
    assert (gpt2.layout.kv_heads, gpt2.layout.layers, gpt2.layout.head_dim) == (4, 2, 16)
    assert (llama.vocab_size, llama.max_model_len, llama.eos_token_ids) == (300, 1024, (257,))
    assert len({models[arch].fingerprint for arch in CONFIGS}) == len(CONFIGS)


def test_no_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors and no model\.safetensors\.index\.json"):
        load(folder)


def test_rope_that_does_not_is_served(folder):
    change_config(folder, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    load(folder)


@pytest.mark.parametrize("model", ["/nowhere/at/all", "no-such-name/no-such-model"])
def test_a_model_that_is_nowhere(model, monkeypatch):
    # huggingface_hub reads its environment when it is imported, so the switch itself is turned.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="is neither a folder nor a model of the hub's cache") as caught:
        load(model)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no usable config\.json"):
        load(folder)


def test_a_length_beyond_the_models(folder):
    with pytest.raises(ConfigError, match="1025 is more than the 1024 positions"):
        load(folder, max_model_len=1025)
    assert load(folder, max_model_len=1024).max_model_len == 1024
    assert load(folder, max_model_len=7).max_model_len == 7


@pytest.mark.parametrize("device", ["cuda", "tpu9"])
def test_a_device_that_is_not_here(folder, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=device):
        load(folder, device=device)


# -- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_copy_has_the_same_fingerprint(folder, checkpoint_folders):
    assert fingerprint(folder) == fingerprint(checkpoint_folders["llama"])


def test_every_weight_byte_counts(folder):
    path = folder / "model.safetensors"
    right, before = path.read_bytes(), fingerprint(folder)
    # The clock of a file system is coarse: each version gets a time of its own.
    for time, position in enumerate((len(right) - 1, len(right) // 2, None), start=1):
        changed = bytearray(right)
        if position is not None:
            changed[position] ^= 1
        path.write_bytes(changed)
        os.utime(path, ns=(time, time))
        assert (fingerprint(folder) == before) == (position is None)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"hidden_act": "gelu"},
    ],
)
def test_settings_that_reach_the_arithmetic_count(folder, changes):
    before = fingerprint(folder)
    change_config(folder, **changes)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("changes", [{"transformers_version": "0.0.1"}, {"use_cache": False}, {"_name_or_path": "x"}])
def test_settings_that_do_not_reach_it_do_not(folder, changes):
    before = fingerprint(folder)
    change_config(folder, **changes)
    assert fingerprint(folder) == before


def test_dtype_and_code_version_count(folder, monkeypatch):
    before = fingerprint(folder)
    assert fingerprint(folder, "bfloat16") != before
    assert load(folder, dtype="bfloat16").fingerprint != load(folder, dtype="float32").fingerprint
    monkeypatch.setattr(fingerprinting, "KV_CODE_VERSION", fingerprinting.KV_CODE_VERSION + 1)
    assert fingerprint(folder) != before


def test_weights_are_read_once(folder, monkeypatch):
    reads = []
    digest = fingerprinting.xxhash.xxh3_128
    monkeypatch.setattr(fingerprinting.xxhash, "xxh3_128", lambda: reads.append(1) or digest())
    first = fingerprint(folder)
    assert len(reads) == 1
    assert fingerprint(folder) == first
    assert len(reads) == 1, "the second time they were read again"
    weights = folder / "model.safetensors"
    other = shutil.copy(weights, folder / "other")
    weights.unlink()
    shutil.move(other, weights)
    assert fingerprint(folder) == first
    assert len(reads) == 2, "another file was taken for the one before"


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"a": 1}', "null"])
def test_a_broken_memory_of_fingerprints_is_no_harm(folder, tmp_path, content):
    before = fingerprint(folder)
    (tmp_path / "cache" / "kvferry" / "fingerprints.json").write_text(content)
    assert fingerprint(folder) == before
    assert fingerprint(folder) == before


def test_progress_ends_at_the_whole(folder):
    said = []
    for _ in range(2):  # read, then remembered
        fingerprint_of(folder, read_config(folder), "float32", lambda *news: said.append(news))
        assert said[-1][1] == said[-1][2] == (folder / "model.safetensors").stat().st_size
