"""A tiny configuration for every architecture that the engine claims, with each one's peculiarities switched on.

Windows are shorter than the tests' prompts, heads and their widths unequal where the architecture lets them be, scales,
caps and factors away from one, so that what is left out or misread changes the logits.
"""

from collections.abc import Callable
from typing import Any

import transformers

VOCAB_SIZE = 300  # more rows than the tokenizer has ids, as real models have
MAX_POSITIONS = 1024
WINDOW = 24
SLIDING, FULL = "sliding_attention", "full_attention"

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
OWN_NAMES = {  # of GPT-2, by the usual ones
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

# What differs from SHAPE. None takes a key away.
SPECIALS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3, "head_dim": 16, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "mistral": {"head_dim": 32, "sliding_window": WINDOW, "tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": WINDOW,
        "layer_types": [SLIDING, FULL],
    },
    "gemma3": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": WINDOW,
        "layer_types": [SLIDING, FULL, SLIDING],
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "phi": {
        "partial_rotary_factor": 0.5,
        "qk_layernorm": True,
        "tie_word_embeddings": False,
    },
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": WINDOW, "tie_word_embeddings": False},
    "gpt_oss": {
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": [SLIDING, FULL],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": MAX_POSITIONS // 4,
        },
        "tie_word_embeddings": False,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
    },
    "olmo2": {"tie_word_embeddings": False},
    "olmo3": {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL], "tie_word_embeddings": False},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
    "cohere2": {
        "num_hidden_layers": 3,
        "logit_scale": 0.25,
        "sliding_window": WINDOW,
        "layer_types": [SLIDING, FULL, SLIDING],
    },
    "starcoder2": {"sliding_window": WINDOW, "use_bias": True},
    "gpt_neox": {
        "num_key_value_heads": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
    },
    "opt": {"num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 128, "word_embed_proj_dim": 32},
    "gpt2": {"num_key_value_heads": None, "intermediate_size": None},
}
CONFIGS: dict[str, Callable[..., transformers.PreTrainedConfig]] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
    "phi": transformers.PhiConfig,
    "phi3": transformers.Phi3Config,
    "gpt_oss": transformers.GptOssConfig,
    "granite": transformers.GraniteConfig,
    "olmo2": transformers.Olmo2Config,
    "olmo3": transformers.Olmo3Config,
    "smollm3": transformers.SmolLM3Config,
    "cohere2": transformers.Cohere2Config,
    "starcoder2": transformers.Starcoder2Config,
    "gpt_neox": transformers.GPTNeoXConfig,
    "opt": transformers.OPTConfig,
    "gpt2": transformers.GPT2Config,
}


def tiny_config(arch: str, **changes: object) -> transformers.PreTrainedConfig:
    """The configuration of `arch`, float32. Embeddings are tied unless SPECIALS or `changes` say otherwise."""
    if arch not in CONFIGS:
        raise ValueError(f"{arch} is none of {', '.join(CONFIGS)}")
    told = {"tie_word_embeddings": True, **SHAPE, **SPECIALS[arch], **changes}
    told = {key: value for key, value in told.items() if value is not None}
    if arch == "gpt2":
        told = {OWN_NAMES.get(key, key): value for key, value in told.items()}
    return CONFIGS[arch](vocab_size=VOCAB_SIZE, dtype="float32", **told)
