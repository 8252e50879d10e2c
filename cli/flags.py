"""The flags of a command, made from the settings that it takes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.cli.foreign import FOREIGN
from kvferry.cli.layers import CONFIG_VARIABLE, Settings, resolve
from kvferry.cli.progress import Alone
from kvferry.cli.run import ROLES, Parent, plain_errors
from kvferry.cli.settings import SETTINGS, Setting, nearest
from kvferry.common.config import LOG_FORMATS, LogConfig, environment
from kvferry.common.errors import ConfigError
from kvferry.common.process import Notifier, die_with_parent
from kvferry.common.telemetry import setup_logging

PANELS: Mapping[str, str] = {
    "serve": "Processes",
    "engine": "Engine",
    "prefill": "Worker",
    "decode": "Worker",
    "router": "Router",
    "router.limits": "What one request may ask for",
    "store": "Store",
    "": "Configuration and logs",
}


NAMES_FLAG = SETTINGS["engine.served_model_name"].flag


@dataclass(frozen=True)
class Flags:
    """The settings of `sections`, but those `without`, given by flags; that of `argument` by its place. `renamed`: what
    is called otherwise here."""

    sections: tuple[str, ...]
    argument: str = ""
    without: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Setting]:
        """By path, in the order of the panels."""
        of_sections = {one.path: one for name in self.sections for one in SETTINGS.values() if one.section == name}
        return {path: one for path, one in of_sections.items() if path not in self.without}

    def name(self, setting: Setting) -> str:
        """What a setting is called on the command line."""
        return "MODEL" if setting.path == self.argument else self.renamed.get(setting.path, setting.flag)

    def names(self) -> dict[str, str]:
        return {path: self.name(setting) for path, setting in self.settings.items()}

    def arguments(self, configs: Mapping[str, Any]) -> tuple[str, ...]:
        """What to call the command with, so that it has the values of `configs`, by section; those that are its
        defaults are left out. Nothing else may tell it anything: see `foreign_environment`."""
        words: list[str] = []
        for setting in self.settings.values():
            value = getattr(configs[setting.section], setting.field.name)
            if setting.path == self.argument:
                words.insert(0, value)
            elif value != setting.default:
                words += [f"{self.name(setting)}={text}" for text in setting.texts(value)]
        return tuple(words)


Run = Callable[..., None]  # of the settings, the parent, and flags of its own


def in_brackets(text: str) -> str:
    """For typer's help, where a bracket alone begins a style."""
    return f"  \\[{text}]"


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help=f"Settings as TOML; `kvferry check-config --toml` prints one.{in_brackets(f'default: {CONFIG_VARIABLE}')}",
        rich_help_panel=PANELS[""],
    ),
]
NotifyFd = Annotated[int | None, typer.Option("--notify-fd", hidden=True)]
ParentPid = Annotated[int | None, typer.Option("--parent-pid", hidden=True)]


def with_flags(command: str, flags: Flags, run: Run, extra: Mapping[str, Any] | None = None) -> Callable[..., None]:
    """`run` as a function that typer makes a command of. `extra`: flags that are no settings, by name with their
    annotation; `run` gets their values. What is wrong is told in one line, with exit code 2."""
    own = {**(extra or {}), "config": ConfigFile, "notify_fd": NotifyFd, "parent_pid": ParentPid}

    def called(**given: Any) -> None:
        notify_fd = given.pop("notify_fd")
        alone = notify_fd is None and command in ROLES
        parent = Parent(notifier=Alone() if alone else Notifier(notify_fd), pid=given.pop("parent_pid"))
        with plain_errors(command, parent.notifier):
            ours = environment()
            file = given.pop("config") or (Path(ours[CONFIG_VARIABLE]) if ours.get(CONFIG_VARIABLE) else None)
            rest = {name: given.pop(name) for name in extra or {}}
            formats = (given["log_format"], ours.get(SETTINGS["log_format"].variable), "auto")
            log_format = next(one for one in formats if one in LOG_FORMATS)
            setup_logging(command, LogConfig(log_format=log_format))  # for what is wrong with the rest
            settings = resolve(flags.names(), said(flags, given), ours, file)
            setup_logging(command, settings.of(""))
            if parent.pid is not None:
                die_with_parent(parent.pid)
            run(settings, parent, **rest)

    annotations = {**{word(path): annotation(flags, setting) for path, setting in flags.settings.items()}, **own}
    called.__annotations__ = annotations
    called.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=told)
            for name, told in annotations.items()
        ]
    )
    called.__doc__ = run.__doc__
    return called


def said(flags: Flags, given: Mapping[str, Any]) -> dict[str, object]:
    """What was given on a command line, by path."""
    return {path: given[word(path)] for path in flags.settings if given[word(path)] not in (None, [])}


def spread(words: Sequence[str]) -> list[str]:
    """A command line with `--served-model-name a b` as `--served-model-name a --served-model-name b`, which is how
    vLLM's users know it, where MODEL comes first. Elsewhere the second word may be MODEL."""
    if len(words) < 2 or words[1].startswith("-"):
        return list(words)
    told, values = [], 0
    for word in words:
        flag = word == NAMES_FLAG
        values = 1 if flag else 0 if word.startswith("-") else values and values + 1
        told += [NAMES_FLAG, word] if values > 2 else [word]
    return told


def understood(command: str, flags: Flags, arguments: Sequence[str]) -> Settings:
    """What a command makes of its arguments, with an environment that says nothing. Raises ConfigError."""
    app = typer.Typer()
    app.command(command)(with_flags(command, flags, lambda: None))
    try:
        context = typer.main.get_command(app).make_context(command, list(arguments))
    except typer.TyperException as error:
        raise ConfigError(mistyped(error)) from None
    return resolve(flags.names(), said(flags, context.params), {}, context.params["config"])


def mistyped(error: typer.TyperException) -> str:
    """What was mistyped, and the nearest that is right. Empty where help has been shown instead."""
    context = getattr(error, "ctx", None)
    message = error.format_message().strip().rstrip(".")
    if context and hasattr(error, "possibilities") and hasattr(error, "option_name"):
        name, known = error.option_name, [name for param in context.command.params for name in param.opts]
        hint = FOREIGN.get(name)
        message = f"there is no {name}" + (f" here: {hint}" if hint else nearest(name, known))
        if hint:
            return message
    if message and not message.endswith("?"):
        path = context.command_path if context else "kvferry"
        message += f"; `{path} --help` lists what there is"
    return message


def word(path: str) -> str:
    """A path as a parameter's name."""
    return path.replace(".", "__")


def annotation(flags: Flags, setting: Setting) -> Any:
    """A flag's values are parsed as those of a file are, so typer passes them on as they stand."""
    if setting.path == flags.argument:
        return Annotated[str | None, typer.Argument(metavar="MODEL", help=setting.help, show_default=False)]
    option = typer.Option(
        flags.name(setting),
        metavar=setting.metavar,
        help=f"{setting.help}{default_text(setting)}",
        rich_help_panel=PANELS[setting.section],
    )
    return Annotated[(list[str] if setting.many else str) | None, option]


def default_text(setting: Setting) -> str:
    """What holds where a flag is not given, nor the setting anywhere else."""
    if setting.required:
        return in_brackets(f"for example {setting.field.metadata['example']}")
    told = setting.field.metadata.get("unset") or ", ".join(setting.texts(setting.default))
    return in_brackets(f"default: {told}") if told else ""
