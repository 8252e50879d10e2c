"""Tiny random checkpoints, with weights wide enough to make the oracle strong.

With the default initialiser logits are so flat that a whole wrong KV block keeps the argmax; these have a deviation of
0.2, so mutants show.
"""

from pathlib import Path

from kvferry.cli.demo_model import SPECIAL_TOKENS, UNPRINTABLE_SCALE, byte_tokenizer, seed_weights

ARCHITECTURES = ("llama", "qwen2", "gpt2")  # what the whole service is tested with; `architectures` has every one
DEVIATION = 0.2
PRINTABLE = range(32, 127)


def tiny_checkpoint(
    folder: Path,
    arch: str,
    seed: int = 0,
    printable: bool = False,
    dtype: str = "float32",
    shard_size: str = "1GB",
    **changes: object,
) -> Path:
    """Write a model of `arch` into `folder` (made if need be) and return `folder`.

    Hidden size 64, 4 heads, 2 KV heads where the architecture has them; norms and biases are random too.
    `changes` go into its config.
    The same seed gives the same bytes, laid out as on the hub (experts one by one, tied weights once).
    `printable`: it writes nothing but printable ASCII, so that its text, sent back in a chat's next turn, is the same
    tokens again. Prompts should be printable too then: the other rows of a shared embedding are small.
    """
    import torch
    from architectures import tiny_config
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    ids = {f"{name}_token_id": 256 + SPECIAL_TOKENS.index(f"<|{name}|>") for name in ("bos", "eos", "pad")}
    config = tiny_config(arch, **ids, **changes)
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
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _seed_vectors(model, generator) -> None:
    """Norms and biases away from ones and zeros, so that one left out is seen; sinks as large as scores."""
    import torch

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("sinks"):
                    parameter.copy_(2 * noise)
                else:
                    parameter += noise * DEVIATION
