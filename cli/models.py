"""What a MODEL argument means, and whether there is a model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from kvferry.cli.demo_model import demo_model
from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError

DEMO = "demo"
Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Found:
    """A model on this host. `name`: what clients call it. `told`: what its config.json says. `weight_files`: there, and
    whole; none where they have not been asked for."""

    folder: Path
    name: str
    told: SimpleNamespace
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


def find(
    model: str, revision: str | None, progress: Progress = lambda done, total: None, fetch_weights: bool = True
) -> Found:
    """The model's files, fetched from the hub if need be; its weights only if they are to be. Raises ConfigError for
    what is missing or damaged, as far as that is seen without loading it."""
    from kvferry.engine.loading.files import SMALL_FILES, WANTED_FILES, find_folder, read_told, weight_files

    where, name = resolve(model, progress)
    whole = fetch_weights or Path(where).is_dir()
    folder = find_folder(where, revision, WANTED_FILES if whole else SMALL_FILES)
    return Found(folder, name, read_told(folder), tuple(weight_files(folder)) if whole else ())
