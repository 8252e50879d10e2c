"""Which models are refused, by name and with the reason: by their config alone, or by running them."""

import json

import pytest
import torch
import transformers
from architectures import CONFIGS, SHAPE, VOCAB_SIZE, tiny_config
from paged_sequences import TOLERANCE, Paged
from transformers import AutoModelForCausalLM

from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError, IncompatibleNode
from kvferry.engine.loading import self_check as checking
from kvferry.engine.loading.architectures import REFUSED, TESTED, check_config, check_max_model_len
from kvferry.engine.loading.model import kv_layout, load_model
from kvferry.engine.loading.self_check import check_rule, self_check

SMALL = {**SHAPE, "vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LATENT = {  # DeepSeek's attention: keys of 24, values of 16
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
GROUPS = {"n_group": 1, "topk_group": 1}


def small(name: str, **changes):
    """A config of the class `name`, small; keys changed to None are left out."""
    told = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    return getattr(transformers, name)(**told)


def load_config(folder, config, architecture, **options):
    folder.mkdir()
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return load_model(EngineConfig(model=str(folder), device="cpu", threads=1, **options), lambda *_: None)


def random_module(config):
    """A model with transformers' own attention, no weight of which is zero."""
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    return module


def test_every_tested_architecture_is_claimed():
    names = {AutoModelForCausalLM._model_mapping[type(tiny_config(arch))].__name__ for arch in CONFIGS}
    assert names == set(TESTED)


# -- by the config, before a weight is read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "architecture", "reason"),
    [
        ("FalconConfig", "FalconForCausalLM", "attends on its own"),
        ("BloomConfig", "BloomForCausalLM", "attends on its own"),
        ("GPTJConfig", "GPTJForCausalLM", "attends on its own"),
        ("MptConfig", "MptForCausalLM", "attends on its own"),
        ("DeepseekV3Config", "DeepseekV3ForCausalLM", "keys and values differ in shape"),
        ("DeepseekV2Config", "DeepseekV2ForCausalLM", "keys and values differ in shape"),
        ("T5Config", "T5ForConditionalGeneration", "an encoder and a decoder"),
        ("BartConfig", "BartForCausalLM", "an encoder and a decoder"),
        ("LlavaConfig", "LlavaForConditionalGeneration", "joins several models"),
        ("Gemma3Config", "Gemma3ForConditionalGeneration", "joins several models"),
        ("BertConfig", "BertForMaskedLM", "no causal language model of that name"),
        ("MambaConfig", "MambaForCausalLM", "not made of attention layers"),
        ("Qwen3NextConfig", "Qwen3NextForCausalLM", "linear_attention"),
        ("BambaConfig", "BambaForCausalLM", "linear_attention|mamba"),
        ("Llama4TextConfig", "Llama4ForCausalLM", "chunked_attention"),
    ],
)
def test_refused_by_its_config(tmp_path, config, architecture, reason):
    with pytest.raises(IncompatibleNode, match=rf"^{architecture} cannot be served: .*({reason})") as caught:
        load_config(tmp_path / "model", getattr(transformers, config)(), architecture)
    assert "\n" not in str(caught.value)


def test_refused_names_are_not_claimed():
    assert set(REFUSED).isdisjoint(TESTED)


def test_attention_that_is_not_causal(tmp_path):
    config = tiny_config("gemma3")
    config.use_bidirectional_attention = True
    with pytest.raises(IncompatibleNode, match="Gemma3ForCausalLM cannot be served: its attention is not causal"):
        load_config(tmp_path / "model", config, "Gemma3ForCausalLM")


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.1] * 4,
    "long_factor": [3.0] * 4,
    "rope_theta": 10000.0,
    "factor": 4.0,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("arch", "changes", "limit"),
    [
        ("llama", {"rope_parameters": DYNAMIC}, 1024),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            1024,
        ),  # as once written
        ("llama", {"rope_parameters": {**LONG, "short_factor": [1.1] * 8, "long_factor": [3.0] * 8}}, 256),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256}, 256),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": DYNAMIC}},
            1024,
        ),
    ],
)
def test_rope_that_depends_on_the_batch(tmp_path, arch, changes, limit):
    told = {**tiny_config(arch).to_dict(), "architectures": ["Some"], **changes}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.architectures = ["LlamaForCausalLM"]
    for asked in (None, limit + 1):
        with pytest.raises(IncompatibleNode, match=rf"depends on the other requests .*--max-model-len {limit} serves"):
            check_config(config, asked)
    check_config(config, limit)


def test_longrope_up_to_its_original_context_is_as_the_oracle_says(checkpoint_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "long"
    config = tiny_config("phi3", pad_token_id=0)
    config.rope_parameters = LONG
    config.original_max_position_embeddings = 256
    random_module(config).save_pretrained(folder)
    options = {"model": str(folder), "device": "cpu", "threads": 1, "dtype": "float32"}
    model = load_model(EngineConfig(**options, max_model_len=256), lambda *_: None)
    assert model.max_model_len == 256
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    batch = Paged(model, reference, [256, 40])
    assert batch.step(s0=255, s1=20) < TOLERANCE
    assert batch.step(s0=1, s1=20) < TOLERANCE
    with pytest.raises(IncompatibleNode, match="--max-model-len 256 serves it"):
        load_model(EngineConfig(**options), lambda *_: None)


def test_a_model_that_does_not_say_how_long_it_may_be():
    config = transformers.MptConfig()
    with pytest.raises(ConfigError, match="give --max-model-len"):
        check_max_model_len(None, config)
    assert check_max_model_len(100, config) == 100


# -- by running it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: small("BloomConfig", n_layer=2, n_head=4), "calls its attention in 0 of its 2 layers"),
        (lambda: small("GPTJConfig", n_embd=64, n_layer=2, n_head=4, rotary_dim=8), "0 of its 2 layers"),
        (lambda: small("FalconConfig", alibi=False), "0 of its 2 layers"),
        (lambda: small("CodeGenConfig", n_embd=64, n_layer=2, n_head=4, rotary_dim=8), "0 of its 2 layers"),
        (lambda: small("DeepseekV3Config", **LATENT, **GROUPS), r"keys \(4, 21, 24\) and values \(4, 21, 16\)"),
        (lambda: small("Llama4TextConfig", attention_chunk_size=16, num_local_experts=2), "position 16 does not see"),
        (lambda: small("Gemma3TextConfig", use_bidirectional_attention=True), "a mask of its own"),
        (lambda: small("DogeConfig"), "a mask of its own"),
        (lambda: small("DiffLlamaConfig"), "attends more than once in layer 0"),
        (lambda: small("StableLmConfig"), "does not pass keywords on"),
        (lambda: small("PersimmonConfig"), "4 KV heads of 16 in layer 0, where its config says 2 of 16"),
        (
            lambda: small("Lfm2Config", layer_types=["conv", "full_attention"]),
            "calls its attention in 1 of its 2 layers",
        ),
    ],
)
def test_refused_once_it_has_run(config, reason):
    config = config()
    module = random_module(config)
    with pytest.raises(IncompatibleNode, match=rf"{type(module).__name__} cannot be served: it .*{reason}"):
        self_check(module, kv_layout(config, 16, "float32"), VOCAB_SIZE)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_the_self_check_at_any_block_size(block_size):
    config = tiny_config("gemma2")
    module = random_module(config)
    self_check(module, kv_layout(config, block_size, "float32"), VOCAB_SIZE)
    assert module.config._attn_implementation == "kvferry"


@pytest.mark.parametrize("config", ["CohereConfig", "OlmoeConfig", "BioGptConfig"])
def test_what_no_test_holds_to_the_oracle_is_served_with_a_warning(tmp_path, monkeypatch, caplog, config):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module = random_module(small(config, num_key_value_heads=None))
    module.save_pretrained(tmp_path / "model")
    load_model(EngineConfig(model=str(tmp_path / "model"), device="cpu", threads=1), lambda *_: None)
    assert f"{type(module).__name__} passed the self-check, but it is not among" in caplog.text


def refusal(model) -> str:
    with pytest.raises(IncompatibleNode) as caught:
        self_check(model.module, model.layout, model.vocab_size)
    return str(caught.value)


def test_a_model_that_does_not_heed_positions(models, monkeypatch):
    model = models["llama"]
    right = model.module.forward
    monkeypatch.setattr(model.module, "forward", lambda *what, position_ids=None, **told: right(*what, **told))
    assert "gives a token other keys at the same position" in refusal(model)


def test_a_model_whose_rows_touch_each_other(models):
    model = models["qwen3_moe"]

    def mix(_module, _given, output):
        return output + output.mean(1, keepdim=True)

    handle = model.module.model.layers[0].mlp.register_forward_hook(mix)
    try:
        assert "gives a token other logits" in refusal(model)
    finally:
        handle.remove()
    self_check(model.module, model.layout, model.vocab_size)


@pytest.mark.parametrize(("arch", "name"), [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("granite", "scaling")])
def test_a_keyword_that_paged_attention_would_lose(models, monkeypatch, arch, name):
    model, right = models[arch], checking.paged_attention
    monkeypatch.setattr(checking, "paged_attention", lambda *what, **told: right(*what, **{**told, name: None}))
    assert "computes attention in layer 0 in another way" in refusal(model)


def test_a_keyword_that_nobody_knows(models, monkeypatch):
    model = models["llama"]
    right = model.module.forward
    monkeypatch.setattr(model.module, "forward", lambda *what, **told: right(*what, position_bias=1.0, **told))
    assert "tells its attention position_bias" in refusal(model)


@pytest.mark.parametrize("window", [23, 25, None])
def test_a_window_that_is_not_the_masks(models, monkeypatch, window):
    for layer in models["olmo3"].module.model.layers:
        if layer.self_attn.sliding_window is not None:
            monkeypatch.setattr(layer.self_attn, "sliding_window", window)
    assert "masks by a rule of its own: in layer 0" in refusal(models["olmo3"])


def test_logits_that_are_not_numbers(models, monkeypatch):
    model = models["llama"]
    monkeypatch.setattr(model.module.model.norm.weight, "data", torch.full((64,), float("inf")))
    assert "not numbers at its end; try another --dtype than float32" in refusal(model)


@pytest.mark.parametrize(("window", "limit"), [(None, None), (5, 5), (4096, 4096)])
def test_rules_that_are_paged_attentions(window, limit):
    check_rule(lambda _b, _h, q, k: (k <= q) & (k > q - (limit or 2**40)), window, 0)


@pytest.mark.parametrize(
    ("rule", "window"),
    [
        (lambda _b, _h, q, k: k <= q + 1, None),
        (lambda _b, _h, q, k: k < q, None),
        (lambda _b, _h, q, k: (k <= q) & (k > q - 4096), None),
        (lambda _b, _h, q, k: (k <= q) & (k > q - 4096), 4097),
        (lambda _b, _h, q, k: (k <= q) & (k > q - 4096), 4095),
        (lambda _b, _h, q, k: (k <= q) & (k // 8192 == q // 8192), None),
        (lambda _b, _h, q, k: (k <= q) & ((k > q - 128) | (k == 0)), 128),
    ],
)
def test_rules_that_are_not(rule, window):
    with pytest.raises(IncompatibleNode, match="masks by a rule of its own: in layer 3"):
        check_rule(rule, window, 3)
