"""What a MODEL argument means."""

from pathlib import Path

from kvferry.cli.demo_model import Progress, demo_model
from kvferry.common.errors import ConfigError

DEMO = "demo"


def resolve(model: str, progress: Progress = lambda done, total: None) -> tuple[str, str]:
    """Where to load a model from, and what to call it: `demo` is made if need be, a local folder is called by its
    name, anything else is a Hugging Face id and called that. Raises ConfigError for a folder that holds no model."""
    if model == DEMO:
        return str(demo_model(progress)), DEMO
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith(("/", ".", "~")):
            raise ConfigError(f"there is no folder {model}")
        return model, model
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{model} is a folder without a config.json; give a model's folder")
    return str(folder.resolve()), folder.resolve().name
