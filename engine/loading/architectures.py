"""Which models can be served, as far as their config tells. `self_check` finds out the rest by running them.

A page pool holds, for each layer, keys and values of one shape, and attention is causal, within a window or not. What
remembers in another way, or whose keys depend on who else is in the batch, is refused here, before weights are read.
"""

from collections.abc import Iterator

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvferry.common.errors import ConfigError, IncompatibleNode

# Held to the oracle by tests/engine/test_oracle_logits.py. What passes the self-check without is served with a warning.
TESTED = (
    "Cohere2ForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SmolLM3ForCausalLM",
    "Starcoder2ForCausalLM",
)
OWN_ATTENTION = "it attends on its own and never calls the attention function that pages its KV"
UNEQUAL = "its keys and values differ in shape, and a block has room for one shape"
REFUSED = {
    "BloomForCausalLM": OWN_ATTENTION,
    "CodeGenForCausalLM": OWN_ATTENTION,
    "DeepseekV2ForCausalLM": UNEQUAL,
    "DeepseekV3ForCausalLM": UNEQUAL,
    "FalconForCausalLM": OWN_ATTENTION,
    "GPTJForCausalLM": OWN_ATTENTION,
    "GPTNeoForCausalLM": OWN_ATTENTION,
    "MptForCausalLM": OWN_ATTENTION,
    "XGLMForCausalLM": OWN_ATTENTION,
}
PAGED_LAYERS = {"full_attention", "sliding_attention"}
NEEDED = ("num_attention_heads", "num_hidden_layers", "vocab_size")


def check_config(hf_config: PreTrainedConfig, max_model_len: int | None) -> None:
    """Raises IncompatibleNode, by name and with the reason. `max_model_len` is what was asked for."""
    name = architecture(hf_config)
    for reason in reasons_against(name, hf_config, max_model_len):
        raise IncompatibleNode(f"{name} cannot be served: {reason}")


def architecture(hf_config: PreTrainedConfig) -> str:
    return (hf_config.architectures or [type(hf_config).__name__])[0]


def reasons_against(name: str, hf_config: PreTrainedConfig, max_model_len: int | None) -> Iterator[str]:
    if name in REFUSED:
        yield REFUSED[name]
    if quantized := getattr(hf_config, "quantization_config", None):
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else str(quantized)
        yield f"its weights are quantized ({method or 'somehow'}); only float32, bfloat16 and float16 ones are read"
    if hf_config.is_encoder_decoder:
        yield "it is an encoder and a decoder, and only decoders are served"
    if any(hasattr(hf_config, part) for part in ("text_config", "vision_config", "audio_config")):
        yield "it joins several models (images, sound), and only text models are served"
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        yield "this transformers has no causal language model of that name"
    if not getattr(hf_config, "is_causal", True) or getattr(hf_config, "use_bidirectional_attention", False):
        yield "its attention is not causal"
    if getattr(hf_config, "kv_lora_rank", None):
        yield UNEQUAL
    if missing := [needed for needed in NEEDED if not isinstance(getattr(hf_config, needed, None), int)]:
        yield f"its config has no {missing[0]}, so it is not made of attention layers"
    if others := sorted(set(getattr(hf_config, "layer_types", None) or ()) - PAGED_LAYERS):
        yield f"it has layers of {others[0]}, and only full and sliding attention are paged"
    if differs_by_layer(hf_config):
        yield "its layers differ in the number or width of their heads, and a block has room for one shape"
    yield from batch_dependent_ropes(hf_config, max_model_len)


def differs_by_layer(hf_config: PreTrainedConfig) -> bool:
    """Newer configs refuse to name one width for all their layers when there are several."""
    try:
        return not all(
            isinstance(getattr(hf_config, name, 0), int | None) for name in ("head_dim", "num_key_value_heads")
        )
    except RuntimeError:
        return True


def batch_dependent_ropes(hf_config: PreTrainedConfig, max_model_len: int | None) -> Iterator[str]:
    """Dynamic NTK and longrope change every position's rotation once any sequence of a batch is longer than the
    original context; up to that length they are as constant as any other."""
    told = getattr(hf_config, "rope_parameters", None) or {}
    for rope in (told, *(part for part in told.values() if isinstance(part, dict))):
        kind = rope.get("rope_type", "default")
        if kind != "longrope" and "dynamic" not in kind:
            continue
        original = rope.get("original_max_position_embeddings") or (
            getattr(hf_config, "original_max_position_embeddings", None) or hf_config.max_position_embeddings
        )
        if max_model_len is None or max_model_len > original:
            yield (
                f"its rope type {kind} depends on the other requests of a batch beyond {original} tokens, so its KV "
                f"could not be shared; --max-model-len {original} serves it up to there"
            )


def check_known(hf_config: PreTrainedConfig) -> str:
    """A warning for an architecture that no test holds to the oracle; empty for one that is tested."""
    name = architecture(hf_config)
    return "" if name in TESTED else f"{name} passed the self-check, but it is not among the architectures tested here"


def check_max_model_len(asked: int | None, hf_config: PreTrainedConfig) -> int:
    """The longest sequence. Raises ConfigError when more is asked for than the model has positions."""
    known = getattr(hf_config, "max_position_embeddings", None)
    if known is None and asked is None:
        raise ConfigError("the model's config does not say how many positions it has; give --max-model-len")
    if None not in (known, asked) and asked > known:
        raise ConfigError(f"--max-model-len {asked} is more than the {known} positions this model was made for")
    return asked or known
