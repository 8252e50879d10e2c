"""Loading a model: from a folder or a hub id to a module that is ready to run, and the shape of its KV.

What cannot be served is refused in one sentence: by the config before weights are read (`architectures`), by the files
(`checkpoint`), or by running the model once it is there (`self_check`).
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import set_tqdm_hook

from kvferry.common.block import BlockLayout
from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError, IncompatibleNode
from kvferry.common.process import usable_cores
from kvferry.engine.attention import ATTENTION_NAME
from kvferry.engine.loading.architectures import (
    OWN_ATTENTION,
    architecture,
    check_config,
    check_known,
    check_max_model_len,
    kv_layout,
    pick_dtype,
)
from kvferry.engine.loading.checkpoint import end_tokens, read_config
from kvferry.engine.loading.files import find_folder, told_as
from kvferry.engine.loading.fingerprint import fingerprint_of
from kvferry.engine.loading.progress import Progress
from kvferry.engine.loading.self_check import self_check
from kvferry.kernels.packed_linear import can_pack, pack_linears

log = logging.getLogger(__name__)


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
    check_config(hf_config, config.max_model_len)
    max_model_len = check_max_model_len(config.max_model_len, hf_config)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, hf_config)
    torch.set_num_threads(config.threads or usable_cores())
    layout = kv_layout(hf_config, config.block_size, dtype)
    fingerprint = fingerprint_of(folder, hf_config, dtype, progress)
    module = read_weights(folder, architecture(hf_config), getattr(torch, dtype), progress)
    module = module.to(device).eval().requires_grad_(False)
    progress("check", 0, 1)  # kernels are compiled here, the first time on a machine
    prepare = partial(pack_linears, module) if can_pack(device, module.dtype) else lambda: None
    self_check(module, layout, hf_config.vocab_size, prepare)
    progress("check", 1, 1)
    if warning := check_known(hf_config):
        log.warning(warning)
    return LoadedModel(
        module=module,
        layout=layout,
        fingerprint=fingerprint,
        vocab_size=hf_config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=end_tokens(folder, hf_config),
        device=device,
    )


def read_weights(folder: Path, name: str, dtype: torch.dtype, progress: Progress) -> PreTrainedModel:
    """The module with our attention, on the CPU. Raises ConfigError when a parameter is not in the files, which
    transformers would make up, or has another shape there; IncompatibleNode when the model picks its attention from a
    table of its own.

    Experts are left to transformers' choice, grouped matrix products where the device has them: each token's result is
    that of its own experts, whoever else is in the batch, and no weights are copied."""
    with told_as(f"{folder} cannot be loaded"), own_table_refused(name), loading_progress(progress):
        module, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"{folder} lacks {len(missing)} of the model's tensors, such as {missing[0]}")
    if unused := sorted(report["unexpected_keys"]):
        log.warning("%s holds %d tensors that its config has no use for, such as %s", folder, len(unused), unused[0])
    return module


@contextmanager
def own_table_refused(name: str) -> Iterator[None]:
    """Older models look their attention up in a table of their own, where ours is not."""
    try:
        yield
    except KeyError as error:
        if error.args != (ATTENTION_NAME,):
            raise
        raise IncompatibleNode(f"{name} cannot be served: {OWN_ATTENTION}") from error


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


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch sees no GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (there := torch.cuda.device_count()):
        raise ConfigError(f"--device {name}: torch sees {there} GPUs here, counted from cuda:0")
    return device
