"""A checkpoint on disk: its folder, its weight files, what they weigh, and what a person is told when one is not right.

Knows neither torch nor transformers, so that a command can look before it loads anything.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError, safe_open

from kvferry.common.block import DTYPE_BYTES
from kvferry.common.errors import ConfigError

WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
UNWANTED_FILES = ("consolidated*", "*/*.safetensors")  # the same weights again, in other layouts
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES = ("*.json",)  # enough to know a model by, but for its weights
OLDER_NAMES = {
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "torch_dtype": "dtype",
}
STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of what is cast to the dtype that the model runs in


@contextmanager
def told_as(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is a ConfigError: `what`, and the first line of the reason."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ConfigError(f"{what}: {reason}") from error


def find_folder(model: str, revision: str | None, wanted: Sequence[str] = WANTED_FILES) -> Path:
    """The local folder of a checkpoint; a hub id is looked up in the hub's cache or fetched, its `wanted` files. Only a
    hub id can have a revision."""
    if (path := Path(model).expanduser()).is_dir():
        if revision is not None:
            raise ConfigError(f"--revision {revision} is for models of the hub, and {model} is a folder")
        return path
    at = "" if revision is None else f" at revision {revision}"
    where = "of the hub's cache, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "that could be fetched"
    with told_as(f"{model!r}{at} is neither a folder nor a model {where}"):
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(UNWANTED_FILES),
            local_files_only=constants.HF_HUB_OFFLINE,  # older versions look a commit's files up even then
        )
    return Path(folder)


def read_told(folder: Path) -> SimpleNamespace:
    """What config.json says, by the names that transformers gives it today. Raises ConfigError."""
    with told_as(f"{folder} holds no usable config.json"):
        told = json.loads((folder / "config.json").read_text("utf-8"))
        if not isinstance(told, dict) or not isinstance(told.get("model_type"), str):
            raise ValueError("it names no model_type")
        known = {OLDER_NAMES.get(name, name): value for name, value in told.items()}
        return SimpleNamespace(**known | {"architectures": known.get("architectures") or [told["model_type"]]})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the model is read from, in order of name: one, or the shards of an index. Raises
    ConfigError for one that is missing, cut short, or without the tensors that the index says it has."""
    if (folder / SINGLE).is_file():
        shards: dict[str, set[str]] = {SINGLE: set()}
    elif (folder / INDEX).is_file():
        shards = read_index(folder / INDEX)
    else:
        raise ConfigError(f"{folder} holds no {SINGLE} and no {INDEX} (other formats are not read: they can run code)")
    for name, tensors in sorted(shards.items()):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / INDEX} names {name}, which is not there")
        with told_as(f"{folder / name} is not a whole safetensors file"), safe_open(folder / name, "np") as file:
            missing = sorted(tensors - set(file.keys()))
        if missing:
            raise ConfigError(f"{folder / name} lacks {missing[0]}, which {INDEX} says it has")
    return [folder / name for name in sorted(shards)]


def read_index(index: Path) -> dict[str, set[str]]:
    """The tensors of each shard."""
    shards: dict[str, set[str]] = {}
    with told_as(f"{index} is not an index of shards"):
        for tensor, name in json.loads(index.read_text())["weight_map"].items():
            if Path(name).name != name:
                raise ValueError(f"{name} is not a file's name")
            shards.setdefault(name, set()).add(tensor)
    if not shards:
        raise ConfigError(f"{index} names no shards")
    return shards


def weight_bytes(files: Sequence[Path], dtype: str) -> int:
    """Memory for the tensors of some files in a dtype, or as they are stored for `auto`. Others than floats, which are
    none of a model's parameters, are left out."""
    total = 0
    for path in files:
        with told_as(f"{path} is not a whole safetensors file"), safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                tensor = file.get_slice(name)
                if stored := STORED_BYTES.get(tensor.get_dtype()):
                    total += prod(tensor.get_shape()) * DTYPE_BYTES.get(dtype, stored)
    return total
