"""Settings: how one is declared, and how its value is written: sizes, counts, numbers."""

import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any

from kvferry.common.errors import ConfigError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
OF_FIELDS = (("_s", "_seconds"), ("_bytes", "_size"))  # how a field's name says its unit, and how a setting's name does
COUNT = re.compile(r"(-?\d+|\d+\.\d+(?=[kmgKMG]))([kmgKMG]?)")


def parse_size(text: str) -> int:
    """Bytes of `4GiB`, `512MiB`, `1.5G` or `4096`."""
    if not (found := SIZE.fullmatch(text.strip())):
        raise ConfigError(f"{text!r} is not a size; write it like 4GiB, 512MiB or 4096")
    return int(float(found[1]) * UNITS[(found[2] or "").lower()]) if "." in found[1] or found[2] else int(found[1])


def size_text(size: int) -> str:
    """Bytes as a person writes them, in the largest binary unit that divides them."""
    for unit in ("ti", "gi", "mi", "ki"):
        if size and size % UNITS[unit] == 0:
            return f"{size // UNITS[unit]}{unit[0].upper()}iB"
    return str(size)


def counted(number: int, noun: str) -> str:
    """So many of something, as a person writes it: `1 block`, `2 blocks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def parse_count(text: str) -> int:
    """A whole number, such as 32768, 32K (times 1024) or 32k (times 1000)."""
    if not (found := COUNT.fullmatch(text.strip())):
        raise ConfigError(f"{text!r} is not a whole number; write it like 32768, 32K (that is 32768) or 32k (32000)")
    return int(float(found[1]) * MULTIPLES[found[2]]) if "." in found[1] else int(found[1]) * MULTIPLES[found[2]]


def parse_number(text: str) -> float:
    """A number, such as 2 or 0.5."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{text!r} is not a number; write it like 2 or 0.5")
    return number


def setting(help: str, default: Any = MISSING, **more: Any) -> Any:
    """A field that is a setting: one for people to give. A field without `help` is none.

    `name`: its key and flag where they do not follow from the field's name. `example`: of one without a default.
    `follows`: the setting whose value it has unless it is given. `secret`: what it names is a file with secrets.
    `unset`: what it means that there is no value. `synonyms`: words that may be given, and the values they stand for.
    """
    return field(default=default, metadata={"help": help, **more})


def nearest_of(name: str, known: Sequence[str]) -> str | None:
    """Which of the known names somebody meant who wrote `name`, if any is close: up to a quarter of its letters may be
    wrong, missing, too many or swapped with the next (optimal string alignment), and one always. Case, dashes for
    underscores, and what all of them begin with do not count."""
    plain = [one.lower().replace("-", "_") for one in (name, *known)]
    shared = next((i for i, letters in enumerate(zip(*plain, strict=False)) if len({*letters}) > 1), 0)
    written, *others = (one[shared:] for one in plain)
    most = max(1, len(written) // 4)
    close = {one: distance(written, other) for one, other in zip(known, others, strict=True)
             if abs(len(written) - len(other)) <= most}  # fmt: skip
    nearest = min(close, key=close.__getitem__, default=None)
    return nearest if nearest is not None and close[nearest] <= most else None


def distance(one: str, other: str) -> int:
    """Letters to change, add, leave out or swap with the next to make one of the other."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, wanted in enumerate(other, start=1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != wanted)))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def key_of(field: Field) -> str:
    """What a setting is called in a file, by its dataclass's field."""
    if name := field.metadata.get("name"):
        return name
    for unit, word in OF_FIELDS:
        if field.name.endswith(unit):
            return field.name.removesuffix(unit) + word
    return field.name


class WrongValue(ConfigError):
    """The value of one setting cannot be. `field`: its dataclass's field of that name. `fault`: what follows the name
    that it was given by, which is only known where the settings come from."""

    def __init__(self, config: Any, field: str, fault: str):
        (name,) = (key_of(one) for one in fields(config) if one.name == field)
        super().__init__(f"{name} {fault}")
        self.field, self.fault = field, fault


def require_least(config: Any, least: float, *names: str) -> None:
    """Raise WrongValue for one of these fields that is less; None is not."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise WrongValue(config, name, f"is {value:g}; it must be at least {least:g}")


def require_word(config: Any, name: str, *words: str) -> None:
    """Raise WrongValue for a field that is none of these words."""
    if (value := getattr(config, name)) not in words:
        raise WrongValue(config, name, f"is {value!r}; use {', '.join(words[:-1])} or {words[-1]}")


def url_of(host: str, port: int) -> str:
    """Where somebody listens, for people and their clients."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
