"""Which models can be served, as far as their config tells. `self_check` finds out the rest by running them.

A page pool holds, for each layer, keys and values of one shape, and attention is causal, within a window or not. What
remembers in another way, or whose keys depend on who else is in the batch, is refused here, before weights are read.

A config is transformers' where that is loaded, and else what config.json says (`files.read_told`): without the defaults
of the model's type, so that what it leaves out is not known.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvferry.common.block import DTYPE_BYTES, BlockLayout
from kvferry.common.errors import ConfigError, IncompatibleNode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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


def check_config(hf_config: "PreTrainedConfig", max_model_len: int | None) -> None:
    """Raises IncompatibleNode, by name and with the reason. `max_model_len` is what was asked for."""
    name = architecture(hf_config)
    for reason in reasons_against(name, hf_config, max_model_len):
        raise IncompatibleNode(f"{name} cannot be served: {reason}")


def check_told(told: Any, max_model_len: int | None) -> None:
    """What of that can be seen without transformers. Raises IncompatibleNode or ConfigError."""
    for reason in reasons_told(architecture(told), told):
        raise IncompatibleNode(f"{architecture(told)} cannot be served: {reason}")
    if max_model_len is not None:
        check_max_model_len(max_model_len, told)


def architecture(config: Any) -> str:
    return (config.architectures or [type(config).__name__])[0]


def reasons_told(name: str, config: Any) -> Iterator[str]:
    """Those that no default of the model's type has a say in."""
    if name in REFUSED:
        yield REFUSED[name]
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else str(quantized)
        yield f"its weights are quantized ({method or 'somehow'}); only float32, bfloat16 and float16 ones are read"
    if getattr(config, "is_encoder_decoder", False):
        yield "it is an encoder and a decoder, and only decoders are served"
    if any(hasattr(config, part) for part in ("text_config", "vision_config", "audio_config")):
        yield "it joins several models (images, sound), and only text models are served"


def reasons_against(name: str, hf_config: "PreTrainedConfig", max_model_len: int | None) -> Iterator[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    yield from reasons_told(name, hf_config)
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


def differs_by_layer(hf_config: "PreTrainedConfig") -> bool:
    """Newer configs refuse to name one width for all their layers when there are several."""
    try:
        return not all(
            isinstance(getattr(hf_config, name, 0), int | None) for name in ("head_dim", "num_key_value_heads")
        )
    except RuntimeError:
        return True


def batch_dependent_ropes(hf_config: "PreTrainedConfig", max_model_len: int | None) -> Iterator[str]:
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


def check_known(hf_config: "PreTrainedConfig") -> str:
    """A warning for an architecture that no test holds to the oracle; empty for one that is tested."""
    name = architecture(hf_config)
    return "" if name in TESTED else f"{name} passed the self-check, but it is not among the architectures tested here"


def check_max_model_len(asked: int | None, config: Any) -> int:
    """The longest sequence. Raises ConfigError when more is asked for than the model has positions."""
    known = getattr(config, "max_position_embeddings", None)
    if known is None and asked is None:
        raise ConfigError("the model's config does not say how many positions it has; give --max-model-len")
    if None not in (known, asked) and asked > known:
        raise ConfigError(f"--max-model-len {asked} is more than the {known} positions this model was made for")
    return asked or known


def pick_dtype(name: str, config: Any) -> str:
    """`auto` is the checkpoint's own dtype, float32 if it names none."""
    if name != "auto":
        return name
    own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    if own not in DTYPE_BYTES:
        raise ConfigError(f"the checkpoint is in {own}; choose --dtype {', '.join(DTYPE_BYTES)}")
    return own


def kv_layout(config: Any, block_size: int, dtype: str) -> BlockLayout:
    """What the config says; `self_check` sees whether it is true."""
    heads = config.num_attention_heads
    return BlockLayout(
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        layers=config.num_hidden_layers,
        block_size=block_size,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
    )
