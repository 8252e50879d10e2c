"""What a MODEL argument means, and whether there is a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from kvferry.cli.demo_model import demo_model
from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError

DEMO = "demo"
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # of a model, all that a router reads
Progress = Callable[[str, int, int], None]  # step, done, total


def no_progress(step: str, done: int, total: int) -> None:
    """For who shows none."""


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
            served_model_name=engine.served_model_name or (self.name,),
            tokenizer=engine.tokenizer or str(self.folder),
        )

    def weight_bytes(self, dtype: str) -> int:
        """Memory that the weights take in a dtype, or as they are stored for `auto`."""
        from kvferry.engine.loading.files import weight_bytes

        return weight_bytes(self.weight_files, dtype)


def resolve(model: str, progress: Progress = no_progress) -> tuple[str, str]:
    """Where to load a model from, and what to call it: `demo` is made if need be, a local folder is called by its
    name, anything else is a Hugging Face id and called that. Raises ConfigError for a folder that holds no model."""
    if model == DEMO:
        return str(demo_model(partial(progress, "make"))), DEMO
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


def find(model: str, revision: str | None, progress: Progress = no_progress, fetch_weights: bool = True) -> Found:
    """The model's files, fetched from the hub if need be; its weights only if they are to be. Raises ConfigError for
    what is missing or damaged, as far as that is seen without loading it."""
    from kvferry.engine.loading.files import SMALL_FILES, WANTED_FILES, read_told, weight_files

    where, name = resolve(model, progress)
    whole = fetch_weights or Path(where).is_dir()
    folder = fetched(where, revision, WANTED_FILES if whole else SMALL_FILES, progress)
    return Found(folder, name, read_told(folder), tuple(weight_files(folder)) if whole else ())


def find_text_side(model: str, revision: str | None, progress: Progress = no_progress) -> Path:
    """The folder of a model's tokenizer and the like, fetched from the hub if need be. Raises ConfigError."""
    return fetched(resolve(model, progress)[0], revision, TEXT_FILES, progress)


def fetched(where: str, revision: str | None, wanted: Sequence[str], progress: Progress) -> Path:
    """The folder itself, or where `wanted` files of a Hugging Face id are. Raises ConfigError."""
    from kvferry.engine.loading.files import find_folder

    if not Path(where).is_dir():
        progress("fetch", 0, 0)
    try:
        return find_folder(where, revision, wanted)
    except ConfigError as error:
        if error.__cause__ is None:  # of a folder
            raise
        raise ConfigError(
            f"there is no folder {where}, and as a model of the hub it cannot be had: "
            f"{why_not_fetched(revision, error.__cause__)}; give a local folder, or `{DEMO}`, which needs no network"
        ) from error


def why_not_fetched(revision: str | None, error: BaseException) -> str:
    """What was tried to fetch a model, and how that ended."""
    from huggingface_hub import constants, errors

    hub, token = f"the hub at {constants.ENDPOINT}", "a token that may read it, in the environment as HF_TOKEN"
    match error:
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"{constants.HF_HUB_CACHE} does not hold it, and HF_HUB_OFFLINE is set, so nothing is fetched"
        case errors.LocalEntryNotFoundError():
            return f"{hub} did not give it ({root_reason(error)}), and {constants.HF_HUB_CACHE} does not hold it"
        case errors.HFValidationError():
            return "this is no model's id, which is like OWNER/NAME"
        case errors.GatedRepoError():
            return f"{hub} asks to accept its terms there, and for {token}"
        case errors.RevisionNotFoundError():
            return f"{hub} has it, but not at revision {revision}"
        case errors.RepositoryNotFoundError():
            return f"{hub} does not have it, or not without {token}"
    return f"{hub} was asked, and then: {root_reason(error)}"


def root_reason(error: BaseException) -> str:
    """The first line of what an error comes from."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), "") or type(error).__name__
