"""What a MODEL argument means."""

from pathlib import Path

from kvferry.cli.demo_model import Progress, demo_model

DEMO = "demo"


def resolve(model: str, progress: Progress = lambda done, total: None) -> tuple[str, str]:
    """Where to load a model from, and what to call it: `demo` is made if need be, a local folder is called by its
    name, anything else is a Hugging Face id and called that."""
    if model == DEMO:
        return str(demo_model(progress)), DEMO
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder.resolve()), folder.resolve().name
    return model, model
