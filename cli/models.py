"""What a MODEL argument means, and whether there is a model."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kvferry.cli.demo_model import demo_model
from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError

DEMO = "demo"
Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Found:
    """A model on this host. `name`: what clients call it. `weight_files`: there, and whole."""

    folder: Path
    name: str
    weight_files: tuple[Path, ...]

    def named(self, engine: EngineConfig) -> EngineConfig:
        """The engine's configuration with all that is left open of the model: its folder, its name, its tokenizer."""
        return replace(
            engine,
            model=str(self.folder),
            revision=None,
            served_model_name=engine.served_model_name or self.name,
            tokenizer=engine.tokenizer or str(self.folder),
        )

    def weight_bytes(self, dtype: str) -> int:
        """Memory that the weights take in a dtype, or as they are stored for `auto`."""
        from kvferry.engine.loading.files import weight_bytes

        return weight_bytes(self.weight_files, dtype)


def resolve(model: str, progress: Progress = lambda done, total: None) -> tuple[str, str]:
    """Where to load a model from, and what to call it: `demo` is made if need be, a local folder is called by its
    name, anything else is a Hugging Face id and called that. Raises ConfigError for a folder that holds no model."""
    if model == DEMO:
        return str(demo_model(progress)), DEMO
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"{model} is a file; give the folder of a model")
        if model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise ConfigError(f"there is no folder {model}")
        return model, model
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{model} is a folder without a config.json; give a model's folder")
    return str(folder.resolve()), folder.resolve().name


def find(model: str, revision: str | None, progress: Progress = lambda done, total: None) -> Found:
    """The model's files, fetched from the hub if need be. Raises ConfigError for what is missing or damaged, as far as
    that is seen without loading it."""
    from kvferry.engine.loading.files import find_folder, weight_files

    where, name = resolve(model, progress)
    folder = find_folder(where, revision)
    try:
        json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no usable config.json: {error}") from error
    return Found(folder, name, tuple(weight_files(folder)))
