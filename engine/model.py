"""Loading a model: weights, the shape of its KV, and the fingerprint that makes KV interchangeable.

The fingerprint is XXH3-128 over the config, every weight byte, the dtype and `KV_CODE_VERSION`, so two nodes with equal
fingerprints compute equal KV for equal tokens.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import xxhash
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import set_tqdm_hook

from kvferry.common.block import DTYPE_BYTES, BlockLayout
from kvferry.common.config import EngineConfig, cache_dir
from kvferry.common.errors import ConfigError, IncompatibleNode
from kvferry.common.hashing import length_prefixed
from kvferry.engine.attention import ATTENTION_NAME, lay_out
from kvferry.engine.batch import Row, StepPlan
from kvferry.kernels.cpu_attention import Workspace
from kvferry.kernels.packed_linear import can_pack, pack_linears

KV_CODE_VERSION = 2  # raised whenever our own arithmetic changes what ends up in a block
SUPPORTED = ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM")
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
WEIGHT_CHUNK = 2**24

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run; the module belongs to the runner."""

    module: PreTrainedModel
    layout: BlockLayout
    fingerprint: bytes
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    device: torch.device


def load_model(config: EngineConfig, progress: Progress) -> LoadedModel:
    """Read a local folder or a hub id (HF_HUB_OFFLINE is honoured). Raises ConfigError with one sentence when that
    cannot work, IncompatibleNode for a model whose attention is not ours to page."""
    folder = find_folder(config.model, config.revision)
    hf_config = read_config(folder)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, hf_config)
    if config.threads:
        torch.set_num_threads(config.threads)
    layout = kv_layout(hf_config, config.block_size, dtype)
    fingerprint = fingerprint_of(folder, hf_config, dtype, progress)
    with loading_progress(progress):
        module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=ATTENTION_NAME, use_safetensors=True
        )
    module = module.to(device).eval().requires_grad_(False)
    if can_pack(device, module.dtype):
        pack_linears(module)
    model = LoadedModel(
        module=module,
        layout=layout,
        fingerprint=fingerprint,
        vocab_size=hf_config.vocab_size,
        max_model_len=pick_max_model_len(config.max_model_len, hf_config),
        eos_token_ids=end_tokens(folder, hf_config),
        device=device,
    )
    check_attention(model)
    return model


@contextmanager
def loading_progress(progress: Progress) -> Iterator[None]:
    """Have transformers tell `progress`, by parameters, instead of drawing a bar of its own."""

    def count(_: object, args: tuple[Iterable, ...], __: dict[str, object]) -> Iterator[object]:
        items = list(args[0]) if args else []
        for done, item in enumerate(items):
            progress("weights", done, len(items))
            yield item
        progress("weights", len(items), len(items))

    previous = set_tqdm_hook(count)
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def find_folder(model: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; a hub id is looked up in the hub's cache or fetched."""
    if (path := Path(model).expanduser()).is_dir():
        return path
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(WANTED_FILES)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{model!r} is neither a folder nor a model that the hub gives: {reason}") from error


def read_config(folder: Path) -> PreTrainedConfig:
    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no usable config.json: {str(error).strip().splitlines()[0]}") from error
    names = hf_config.architectures or [type(hf_config).__name__]
    if names[0] not in SUPPORTED:
        raise ConfigError(f"{names[0]} is not supported yet; {', '.join(SUPPORTED)} are")
    rope = (getattr(hf_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in BATCH_DEPENDENT_ROPE:
        raise ConfigError(f"rope type {rope} depends on the other requests of a batch, so its KV cannot be shared")
    return hf_config


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch sees no GPU here; use --device cpu")
    return device


def pick_dtype(name: str, hf_config: PreTrainedConfig) -> str:
    """`auto` is the checkpoint's own dtype, float32 if it names none."""
    if name != "auto":
        return name
    own = str(hf_config.dtype or "float32").removeprefix("torch.")
    if own not in DTYPE_BYTES:
        raise ConfigError(f"the checkpoint is in {own}; choose --dtype {', '.join(DTYPE_BYTES)}")
    return own


def pick_max_model_len(asked: int | None, hf_config: PreTrainedConfig) -> int:
    known = hf_config.max_position_embeddings
    if asked is not None and asked > known:
        raise ConfigError(f"--max-model-len {asked} is more than the {known} positions this model was made for")
    return asked or known


def kv_layout(hf_config: PreTrainedConfig, block_size: int, dtype: str) -> BlockLayout:
    heads = hf_config.num_attention_heads
    return BlockLayout(
        kv_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
        layers=hf_config.num_hidden_layers,
        block_size=block_size,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        dtype=dtype,
    )


def end_tokens(folder: Path, hf_config: PreTrainedConfig) -> tuple[int, ...]:
    """The ids that end a sequence: of generation_config.json where there is one, else of the config."""
    ids = hf_config.eos_token_id
    if (folder / "generation_config.json").exists():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def fingerprint_of(folder: Path, hf_config: PreTrainedConfig, dtype: str, progress: Progress) -> bytes:
    """16 bytes. What is in the config but does not reach the arithmetic (who saved it, where) is left out."""
    told = hf_config.to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "use_cache"):
        told.pop(key, None)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} holds no .safetensors weights (other formats are not read: they can run code)")
    digests = hash_files(files, progress)
    config_text = json.dumps(told, sort_keys=True, default=str)
    return xxhash.xxh3_128_digest(length_prefixed("kvferry-model", KV_CODE_VERSION, dtype, config_text, *digests))


def hash_files(files: list[Path], progress: Progress) -> list[bytes]:
    """XXH3-128 of each file. Remembered in the cache folder by path, size, mtime and inode."""
    memory = cache_dir() / "fingerprints.json"
    try:
        known = msgspec.json.decode(memory.read_bytes(), type=dict[str, str])
    except (FileNotFoundError, msgspec.MsgspecError):
        known = {}
    total, done, digests, fresh = sum(f.stat().st_size for f in files), 0, [], {}
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        if key not in known:
            digest = xxhash.xxh3_128()
            with file.open("rb") as stream:
                while chunk := stream.read(WEIGHT_CHUNK):
                    digest.update(chunk)
                    progress("hash", done := done + len(chunk), total)
            known[key] = fresh[key] = digest.hexdigest()
        else:
            progress("hash", done := done + stat.st_size, total)
        digests.append(bytes.fromhex(known[key]))
    if fresh:
        scratch = memory.with_suffix(f".{stat.st_ino}.{id(fresh)}.tmp")
        scratch.write_text(json.dumps(known))
        scratch.replace(memory)
    return digests


@torch.inference_mode()
def check_attention(model: LoadedModel) -> None:
    """Run two tokens and count: a model must call our attention once a layer. Raises IncompatibleNode by name."""
    pool = torch.zeros(1, *model.layout.shape, dtype=getattr(torch, model.layout.dtype), device=model.device)
    plan = StepPlan((Row(0, (0, 0)[: model.layout.block_size], 0, (0,), None),))
    tokens, positions, batch = lay_out(plan, pool, Workspace())
    model.module(input_ids=tokens, position_ids=positions, use_cache=False, paged_batch=batch)
    if batch.calls != model.layout.layers:
        raise IncompatibleNode(
            f"{type(model.module).__name__} calls its attention {batch.calls} times in {model.layout.layers} layers, "
            "so its KV cannot be paged"
        )
