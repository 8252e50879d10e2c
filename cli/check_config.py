"""`kvferry check-config`: every value and where it came from."""

import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.cli import serve
from kvferry.cli.checks import check_router, check_values
from kvferry.cli.layers import EXAMPLE, VERSION, Settings, Value
from kvferry.cli.models import DEMO
from kvferry.cli.plan import make_plan, understood_plan
from kvferry.cli.run import Parent
from kvferry.cli.serve import private_folder
from kvferry.cli.settings import SECTIONS, SETTINGS, Setting
from kvferry.common.errors import ConfigError
from kvferry.common.process import usable_cores

FLAGS = serve.FLAGS
EXTRA = {
    "as_json": Annotated[bool | None, typer.Option("--json", help="Print JSON: by path, the value and its source.")],
    "as_toml": Annotated[bool | None, typer.Option("--toml", help="Print a configuration file with the same values.")],
}


def check_config(settings: Settings, parent: Parent, as_json: bool | None, as_toml: bool | None) -> None:
    """Print every setting's value and where it came from, then look at all that `serve` looks at before it starts.

    Takes the flags of `serve` and refuses what it refuses, also a port that is taken now, or a model that does not fit
    into memory now. Without a MODEL only the rest is looked at; the weights of one from the hub are not fetched.
    """
    if as_json and as_toml:
        raise ConfigError("--json and --toml are two ways to print the same; give one of them")
    check_values(settings)
    tell(settings, as_json, as_toml)
    sys.stdout.flush()
    with private_folder() as folder:
        if settings["engine.model"] is not None:
            serve.look(make_plan(settings, folder, usable_cores()), parent.notifier.progress, fetch_weights=False)
        else:
            example = {**settings.values, "engine.model": Value(DEMO, EXAMPLE)}
            check_router(understood_plan(make_plan(Settings(example, settings.names), folder, usable_cores())).router)


def tell(settings: Settings, as_json: bool | None, as_toml: bool | None) -> None:
    if as_toml:
        print(toml(settings), end="")
    elif as_json:
        told = {path: {"value": plain(path, one), "source": one.source} for path, one in settings.values.items()}
        print(json.dumps(told, indent=2))
    else:
        show(settings)


def plain(path: str, told: Value) -> Any:
    """A value for JSON: numbers as numbers, paths and sizes as text, None where nothing is given."""
    setting = SETTINGS[path]
    if setting.many:
        return list(told.value or ())
    if isinstance(told.value, Path) or setting.is_size:
        return (setting.texts(told.value) or [None])[0]
    return told.value


def show(settings: Settings) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "value", "from", box=box.SIMPLE_HEAD, pad_edge=False)
    for path, told in settings.values.items():
        texts = SETTINGS[path].texts(told.value)
        style = "bold" if told.given else "dim"
        table.add_row(path, ", ".join(texts) or "-", told.source, style=style)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)


def toml(settings: Settings) -> str:
    """A configuration file that gives the same values; what has none is there as a comment."""
    lines = [f"version = {VERSION}"]
    for section in SECTIONS:
        lines += ["", f"[{section}]"] if section else []
        lines += [
            line
            for path, told in settings.values.items()
            if SETTINGS[path].section == section
            for line in toml_lines(SETTINGS[path], told.value)
        ]
    return "\n".join(lines) + "\n"


def toml_lines(setting: Setting, value: Any) -> Iterator[str]:
    yield f"# {setting.help}"
    if value is None or value is MISSING:
        yield f"# {setting.key} ="
    elif setting.many:
        yield f"{setting.key} = [{', '.join(toml_text(text) for text in setting.texts(value))}]"
    elif setting.hint in (int, float, bool) and not setting.is_size:
        yield f"{setting.key} = {setting.texts(value)[0]}"
    else:
        yield f"{setting.key} = {toml_text(setting.texts(value)[0])}"


def toml_text(text: str) -> str:
    """A TOML string. JSON's escapes are TOML's, but for DEL, which JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
