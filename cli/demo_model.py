"""The `demo` model: Llama-shaped, about 30M random parameters, made on this machine on first use.

It shows the machinery, not language. Two things about its weights are chosen: they are wide enough that logits differ
clearly, so that a wrong KV block changes the answer; and the rows of all tokens but printable ASCII are small, so that
it writes characters a terminal can show and does not end by chance.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.common.config import cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VERSION = 1  # of everything below: another one is another folder
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unused|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
UNPRINTABLE_SCALE = 0.1
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Progress = Callable[[int, int], None]  # done, total


def demo_model(progress: Progress = lambda done, total: None) -> Path:
    """The demo model's folder, made if it is not there. Two processes at once are fine: the first to finish wins."""
    folder = cache_dir() / "models" / f"demo-{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder.parent))
    try:
        _build(building, progress)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise somebody else was first, with the same bytes
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """Token id i is byte i, for i under 256; the special tokens follow. Any text comes back as it was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {char: byte for byte, char in sorted(bytes_to_unicode().items())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        extra_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def seed_weights(model: "torch.nn.Module", seed: int, deviation: float, progress: Progress | None = None) -> None:
    """Fill a model's matrices from N(0, deviation^2) in the order of their names. Vectors (norms, biases) keep their
    initial values. The values do not depend on how the library initialises."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = sorted(model.named_parameters())
    with torch.no_grad():
        for done, (_, parameter) in enumerate(parameters):
            if parameter.dim() > 1:
                parameter.normal_(0.0, deviation, generator=generator)
            if progress:
                progress(done + 1, len(parameters))


def _build(folder: Path, progress: Progress) -> None:
    progress(0, 0)  # the imports take seconds
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    bos, eos, pad, end = (256 + SPECIAL_TOKENS.index(name) for name in ("<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"))
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    seed_weights(model, seed=VERSION, deviation=0.2, progress=progress)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:32] *= UNPRINTABLE_SCALE
        embeddings[127:] *= UNPRINTABLE_SCALE
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=[eos, end], pad_token_id=pad, do_sample=True, temperature=1.0
    )
    save_checkpoint(model, folder)
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_checkpoint(model: "PreTrainedModel", folder: Path) -> None:
    """Write a model as Hugging Face lays it out, with the byte tokenizer. Tied weights are written once."""
    from safetensors.torch import save_file

    save_file(dict(model.named_parameters()), folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
