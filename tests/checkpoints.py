"""Tiny random checkpoints of three architectures, with weights wide enough to make the oracle strong.

With the default initialiser logits are so flat that a whole wrong KV block keeps the argmax; these have a deviation of
0.2, so mutants show.
"""

from pathlib import Path

from kvferry.cli.demo_model import SPECIAL_TOKENS, UNPRINTABLE_SCALE, save_checkpoint, seed_weights

ARCHITECTURES = ("llama", "qwen2", "gpt2")
VOCAB_SIZE = 300  # more rows than the tokenizer has ids, as real models have
MAX_POSITIONS = 1024
DEVIATION = 0.2
PRINTABLE = range(32, 127)


def tiny_checkpoint(folder: Path, arch: str, seed: int = 0, printable: bool = False) -> Path:
    """Write a model of `arch` into `folder` (made if need be) and return `folder`.

    Hidden size 64, 4 heads of 16, 2 KV heads where the architecture has them, float32; norms and biases are random too.
    Llama has an output matrix of its own, the others share the embedding's. The same seed gives the same bytes.
    `printable`: it writes nothing but printable ASCII, so that its text, sent back in a chat's next turn, is the same
    tokens again. Prompts should be printable too then: the other rows of a shared embedding are small.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = _config(arch)
    model = AutoModelForCausalLM.from_config(config)
    seed_weights(model, seed, DEVIATION)
    _seed_vectors(model, torch.Generator().manual_seed(seed + 1))
    if printable:
        with torch.no_grad():
            for rows in (slice(0, PRINTABLE.start), slice(PRINTABLE.stop, None)):
                model.get_output_embeddings().weight[rows] *= UNPRINTABLE_SCALE
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    save_checkpoint(model, folder)
    return folder


def _seed_vectors(model, generator) -> None:
    """Norms and biases away from ones and zeros, so that one left out is seen."""
    import torch

    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=generator) * DEVIATION


def _config(arch: str):
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    ids = {f"{name}_token_id": 256 + SPECIAL_TOKENS.index(f"<|{name}|>") for name in ("bos", "eos", "pad")}
    common = {"vocab_size": VOCAB_SIZE, "dtype": "float32", "tie_word_embeddings": arch != "llama", **ids}
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
    }
    if arch == "llama":
        return LlamaConfig(num_hidden_layers=3, head_dim=16, **shape, **common)
    if arch == "qwen2":
        return Qwen2Config(num_hidden_layers=2, **shape, **common)
    if arch == "gpt2":
        return GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=MAX_POSITIONS, **common)
    raise ValueError(f"{arch} is none of {', '.join(ARCHITECTURES)}")
