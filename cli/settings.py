"""Every setting there is, and its names: a key of the TOML file, a variable of the environment, a flag. All follow from
the dataclasses that hold the values (`setting` in common/values.py): adding a field there is all it takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

from kvferry.common.config import (
    ENVIRONMENT_PREFIX,
    EngineConfig,
    LogConfig,
    RouterConfig,
    ServeConfig,
    StoreConfig,
    WorkerConfig,
)
from kvferry.common.errors import ConfigError
from kvferry.common.values import key_of, nearest_of, parse_count, parse_number, parse_size, size_text
from kvferry.router.limits import Limits

SECTIONS: Mapping[str, type] = MappingProxyType(
    {
        "": LogConfig,
        "serve": ServeConfig,
        "engine": EngineConfig,
        "prefill": WorkerConfig,
        "decode": WorkerConfig,
        "router": RouterConfig,
        "router.limits": Limits,
        "store": StoreConfig,
    }
)
FLAG_PREFIXES: Mapping[str, str] = MappingProxyType({"router.limits": "max-"})


@dataclass(frozen=True)
class Setting:
    """One field of one section. `hint`: its type, without None; of a list, that of one item."""

    section: str
    field: Field
    hint: type
    many: bool

    @cached_property
    def key(self) -> str:
        return key_of(self.field)

    @cached_property
    def path(self) -> str:
        """Section and key, as in `engine.dtype`."""
        return f"{self.section}.{self.key}".lstrip(".")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.path.replace(".", "_").upper()

    @property
    def flag(self) -> str:
        return f"--{FLAG_PREFIXES.get(self.section, '')}{self.key.replace('_', '-')}"

    @property
    def help(self) -> str:
        return self.field.metadata["help"]

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def default(self) -> Any:
        """MISSING where there is none."""
        factory = self.field.default_factory
        return self.field.default if factory is MISSING else factory()

    @property
    def is_size(self) -> bool:
        return self.field.name.endswith("_bytes")

    @property
    def metavar(self) -> str:
        if given := self.field.metadata.get("metavar"):
            return given
        if self.is_size:
            return "SIZE"
        if self.field.name.endswith("_s"):
            return "SECONDS"
        return {int: "NUMBER", float: "NUMBER", bool: "TRUE|FALSE", Path: "PATH"}.get(self.hint, "TEXT")

    def parse(self, given: object) -> Any:
        """The value that was given: text, or a list of texts, or what TOML has. Raises ConfigError."""
        if self.many:
            if not isinstance(given, list | tuple):
                given = [given]
            return tuple(self._parse_one(item) for item in given)
        return self._parse_one(given)

    def _parse_one(self, given: object) -> Any:
        synonyms = self.field.metadata.get("synonyms", {})
        if isinstance(given, str | int) and (word := str(given).lower()) in synonyms:
            return synonyms[word]
        if isinstance(given, bool) and self.hint is bool:
            return given
        if isinstance(given, int | float) and not isinstance(given, bool) and self.hint in (int, float):
            given = str(given)
        if not isinstance(given, str):
            raise ConfigError(f"{given!r} is not what it takes, which is a {self.metavar.lower()}")
        if self.hint is bool:
            if given.lower() not in ("true", "false"):
                raise ConfigError(f"{given!r} is neither true nor false")
            return given.lower() == "true"
        if self.hint is int:
            return parse_size(given) if self.is_size else parse_count(given)
        if self.hint is float:
            return parse_number(given)
        if self.hint is Path:
            from kvferry.router.tenants_file import KEY

            if "\n" in given or KEY.search(given):
                raise ConfigError("it takes the path of a file, and what it was given is a secret itself")
            return Path(given).expanduser()
        return given

    def texts(self, value: Any) -> list[str]:
        """A value as `parse` reads it: none for None, one, or those of a list."""
        if value is None or value is MISSING:
            return []
        if self.many:
            return [str(item) for item in value]
        if self.hint is bool:
            return [str(value).lower()]
        if isinstance(value, float) and value.is_integer():
            return [str(int(value))]
        return [size_text(value) if self.is_size else str(value)]


def settings_of(section: str, kind: type) -> Iterator[Setting]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        if "help" in field.metadata:
            hint, many = hints[field.name], False
            if type(None) in get_args(hint):
                (hint,) = (one for one in get_args(hint) if one is not type(None))
            if get_origin(hint) is tuple:
                hint, many = get_args(hint)[0], True
            yield Setting(section, field, hint, many)


def all_settings(sections: Mapping[str, type]) -> Mapping[str, Setting]:
    """By path, in order of declaration."""
    found = (one for section, kind in sections.items() for one in settings_of(section, kind))
    return MappingProxyType({setting.path: setting for setting in found})


SETTINGS = all_settings(SECTIONS)


def nearest(name: str, known: Sequence[str]) -> str:
    """A question for who mistyped a name, or left its last words out; empty when nothing is near."""
    last = name.rpartition(".")[2]
    elsewhere = [one for one in known if "." in name and one.rpartition(".")[2] == last]
    longer = {one for one in known if one.startswith((f"{name}-", f"{name}_"))}
    close = elsewhere[0] if elsewhere else nearest_of(name, known) or (longer.pop() if len(longer) == 1 else None)
    return f"; did you mean {close}?" if close else ""
