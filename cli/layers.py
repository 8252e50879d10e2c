"""Where values come from: the default, under the TOML file, under the environment, under the flags."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvferry.cli.settings import SECTIONS, SETTINGS, Setting, nearest
from kvferry.common.config import ENVIRONMENT_PREFIX
from kvferry.common.errors import ConfigError
from kvferry.common.values import WrongValue

VERSION = 1
DEFAULT, EXAMPLE = "default", "example"  # sources of what nobody has given
CONFIG_VARIABLE = f"{ENVIRONMENT_PREFIX}CONFIG"
# What Kubernetes and docker links put into the environment of everyone beside a service that is called kvferry.
OF_A_SERVICE = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)$")
SERVICE_URL = re.compile(r"(tcp|udp)://")
SECRET = re.compile(r"secret|passw|credential|api_?key|private_?key", re.IGNORECASE)

Config = TypeVar("Config")


@dataclass(frozen=True)
class Value:
    """`value` is None where nothing is given and there is no default. `source`: where it comes from, in words.
    `follows`: the setting whose value it has."""

    value: Any
    source: str
    follows: str = ""

    @property
    def given(self) -> bool:
        return self.source not in (DEFAULT, EXAMPLE)


@dataclass(frozen=True)
class Settings:
    """The value of every setting, by path. `names`: what those are called that can be given on the command line."""

    values: Mapping[str, Value]
    names: Mapping[str, str]

    def __getitem__(self, path: str) -> Any:
        return self.values[path].value

    def of(self, section: str, **own: Any) -> Any:
        """A section's configuration; `own` are the fields that are no settings, or not given here. Raises ConfigError
        for one that is missing or wrong."""
        held = {}
        for setting in SETTINGS.values():
            if setting.section == section and setting.field.name not in own:
                held[setting.field.name] = self[setting.path]
                if setting.required and self[setting.path] is None:
                    raise ConfigError(self.missing(setting))
        try:
            return SECTIONS[section](**held, **own)
        except WrongValue as error:
            (wrong,) = (one for one in SETTINGS.values() if (one.section, one.field.name) == (section, error.field))
            raise ConfigError(f"{self.called(wrong)} {error.fault}") from None

    def called(self, setting: Setting) -> str:
        """A setting as whoever gave its value called it."""
        value = self.values[setting.path]
        if value.follows:
            return self.called(SETTINGS[value.follows])
        return value.source if value.given else self.names.get(setting.path, setting.path)

    def missing(self, setting: Setting) -> str:
        ways = f"{setting.path} in a --config file or {setting.variable}"
        if setting.path in self.names:
            return f"{self.names[setting.path]} is not given; give it, {ways}"
        return f"{setting.path} is not given; give {ways}"


def resolve(
    names: Mapping[str, str], flags: Mapping[str, object], environment: Mapping[str, str], file: Path | None
) -> Settings:
    """The value of every setting. `flags`: what was given on the command line, by path; `names`: what it is called
    there. Raises ConfigError for what is not known, cannot be read, or would be a secret in the open."""
    values = {}
    for setting in SETTINGS.values():
        default = None if setting.required else setting.default
        values[setting.path] = Value(default, DEFAULT)
    if file is not None:
        values |= {path: read(path, given, f"{file}: {path}") for path, given in read_file(file).items()}
    for name, text in of_environment(environment):
        path = next(setting.path for setting in SETTINGS.values() if setting.variable == name)
        values[path] = read(path, text.split(",") if SETTINGS[path].many else text, name)
    values |= {path: read(path, given, names[path]) for path, given in flags.items()}
    for setting in SETTINGS.values():
        follows = setting.field.metadata.get("follows")
        if follows and not values[setting.path].given and values[follows].given:
            values[setting.path] = Value(values[follows].value, f"as {follows}", follows)
    return Settings(values, names)


def read(path: str, given: object, source: str) -> Value:
    try:
        return Value(SETTINGS[path].parse(given), source)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def of_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The settings in the environment; an empty variable is none."""
    known = [setting.variable for setting in SETTINGS.values()]
    for name, text in environment.items():
        if name == CONFIG_VARIABLE or OF_A_SERVICE.search(name) or SERVICE_URL.match(text) or not text:
            continue
        if name not in known:
            refuse_secret(name, "the environment", known)
            raise ConfigError(f"there is no setting {name}{nearest(name, known)}")
        yield name, text


def read_file(file: Path) -> dict[str, object]:
    """What a TOML file gives, by path. Raises ConfigError."""
    try:
        told = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {file}") from None
    except OSError as error:
        raise ConfigError(f"the configuration file {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {file} is not TOML: {error}") from None
    if (version := told.pop("version", VERSION)) != VERSION or isinstance(version, bool):
        raise ConfigError(f"{file} is a configuration of version {version!r}, and this kvferry reads version {VERSION}")
    return dict(settings_in(told, "", file))


def settings_in(table: Mapping[str, object], section: str, file: Path) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        path = f"{section}.{key}".lstrip(".")
        if path in SECTIONS and isinstance(value, dict):
            yield from settings_in(value, path, file)
        elif path in SETTINGS:
            yield path, value
        elif isinstance(value, dict):
            known = [f"[{one}]" for one in SECTIONS if one]
            raise ConfigError(f"{file}: there is no table [{path}]{nearest(f'[{path}]', known)}")
        else:
            refuse_secret(path, str(file), list(SETTINGS))
            raise ConfigError(f"{file}: there is no setting {path}{nearest(path, list(SETTINGS))}")


def refuse_secret(name: str, where: str, known: list[str]) -> None:
    """Raise ConfigError for a name that asks for a secret itself, where there is one for the file that holds it."""
    for in_file in (f"{name}_file", f"{name}_FILE"):
        if in_file in known:
            raise ConfigError(f"{name} would be a secret in {where}; write it to a file and give its path as {in_file}")
    if SECRET.search(name):
        raise ConfigError(f"{name} would be a secret in {where}; secrets are read from files only, such as that of "
                          "router.tenants_file, which `kvferry keys create` writes")  # fmt: skip
