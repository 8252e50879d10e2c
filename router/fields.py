"""A JSON body into a Struct, field by field: what is unknown, neutral or wrong, each said in one sentence.

Every refusal is an `InvalidRequest` that names the field in `param` and repeats no text of the client's other than
field names, and the word that was sent where one of a few is expected.
"""

import re
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta

from kvferry.common.errors import InvalidRequest
from kvferry.common.values import counted, nearest_of
from kvferry.router.limits import Limits
from kvferry.router.values import shown, shown_word

Body = TypeVar("Body", bound=msgspec.Struct)

MAX_NAME_SHOWN = 64
DIGITS = 400  # of a number in a large body; to read a longer one takes time that grows as their square
SCANNED = 2**18  # bytes of a body that are looked at in one go
ANYTHING = object()  # in a table of neutral values: any value is
NO_HINTS: Mapping[str, str] = MappingProxyType({})


def parse_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """The object in a body. NaN, Infinity, numbers out of range and unpaired surrogates are not JSON and refused here.
    What has too many values is refused before it is made into objects."""
    if not body.strip():
        raise InvalidRequest("the body is empty; send a JSON object")
    check_values(body, limits)
    depth = limits.json_depth
    try:
        raw = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except RecursionError:
        raise _too_deep(depth) from None
    except msgspec.MsgspecError as error:
        detail = str(error).removeprefix("JSON is malformed: ").partition(" - at ")[0].lower()
        raise InvalidRequest(f"the body is not valid JSON: {detail}") from None
    if not isinstance(raw, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {shown(raw)}")
    if body.count(b"[") + body.count(b"{") > depth:  # else it cannot be deeper
        _check_depth(raw, depth)
    return raw


def check_values(body: bytes, limits: Limits) -> None:
    """Raise InvalidRequest for more values than a body may have, by its quotes, brackets and commas, and for a number
    that takes long to read."""
    most, numbers = limits.json_values, limits.prompt_tokens
    if len(body) <= most:
        return  # each has a byte
    text = np.frombuffer(body.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    inside, quotes, opened, commas, digits = False, 0, 0, 0, 0
    for start in range(0, len(text), SCANNED):
        piece = text[start : start + SCANNED]
        quote = piece == ord('"')
        outside = np.logical_xor.accumulate(quote) == inside
        inside ^= bool(np.count_nonzero(quote) % 2)
        quotes += np.count_nonzero(quote)
        opened += np.count_nonzero(((piece == ord("[")) | (piece == ord("{"))) & outside)
        commas += np.count_nonzero((piece == ord(",")) & outside)
        others = np.flatnonzero(~outside | (piece < ord("0")) | (piece > ord("9")))
        runs = np.diff(others, prepend=-1 - digits, append=len(piece)) - 1  # of digits, between others
        digits = int(runs[-1])
        if runs.max() > DIGITS:
            raise InvalidRequest(f"the body has a number of more than {DIGITS} digits")
    if (found := quotes // 2 + opened) > most:
        raise InvalidRequest(
            f"the body has {found} strings, lists and objects, names of fields included; this server takes {most}"
        )
    if commas > most + numbers:
        raise InvalidRequest(f"the body has {commas} commas between values; this server takes {most + numbers}")


def _check_depth(value: dict[str, Any] | list[Any], depth: int) -> None:
    level = [value]
    for _ in range(depth):
        inner = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        if not (level := [item for item in inner if isinstance(item, dict | list)]):
            return
    raise _too_deep(depth)


def _too_deep(depth: int) -> InvalidRequest:
    return InvalidRequest(
        f"the body is nested too deeply; this server takes {counted(depth, 'level')} of objects and lists"
    )


def to_struct(fields: dict[str, Any], body: type[Body]) -> Body:
    """`fields` as a `body`, each of the type and in the range that its annotation says."""
    try:
        return msgspec.convert(fields, body)
    except msgspec.ValidationError as error:
        raise _refusal(error, fields, body) from None


def without_neutral(
    raw: dict[str, Any],
    body: type,
    neutral: Mapping[str, tuple[Any, ...]],
    path: str = "",
    lenient: bool = False,
    hints: Mapping[str, str] = NO_HINTS,
) -> dict[str, Any]:
    """The supported fields of `raw`. Raises for a field that is unknown, or not neutral and not supported; `lenient`
    leaves unknown ones to whoever finds the real fault. `hints`: what to do instead of sending a field."""
    supported = {}
    for name, value in raw.items():
        if name in body.__struct_fields__:
            supported[name] = value
        elif name not in neutral:
            if not lenient:
                raise _unknown(name, path, [*body.__struct_fields__, *neutral], hints)
        elif not _is_neutral(value, neutral[name]):
            raise _unsupported(name, value, path, neutral[name], hints)
    return supported


def _unsupported(
    name: str, value: Any, path: str, accepted: tuple[Any, ...], hints: Mapping[str, str]
) -> InvalidRequest:
    told = f"{path}{name} is not supported yet; leave it out"
    if accepted:
        told += f" or send {msgspec.json.encode(accepted[0]).decode()}"
        if isinstance(accepted[0], str) and accepted[0]:
            told += f", not {shown_word(value)}"
        elif isinstance(accepted[0], dict) and isinstance(value, dict) and isinstance(value.get("type"), str):
            told += f", not one of type {shown_word(value['type'])}"
    hint = f"; {hints[name]}" if name in hints else ""
    return InvalidRequest(told + hint, path + name)


def _is_neutral(value: Any, accepted: tuple[Any, ...]) -> bool:
    return value is None or any(
        one is ANYTHING or (value == one and isinstance(value, bool) == isinstance(one, bool)) for one in accepted
    )


def _unknown(name: str, path: str, known: list[str], hints: Mapping[str, str]) -> InvalidRequest:
    shown = name if len(name) <= MAX_NAME_SHOWN else name[:MAX_NAME_SHOWN] + "..."
    near = nearest_of(name, known) if len(name) <= MAX_NAME_SHOWN else None
    hint = f"; {hints[name]}" if name in hints else f"; did you mean {near}?" if near else ""
    return InvalidRequest(f"{path + shown!r} is not a field of this request{hint}", path + shown)


def _refusal(error: msgspec.ValidationError, raw: dict[str, Any], body: type) -> InvalidRequest:
    """msgspec's complaint (`Expected ... - at `$.messages[0].role``) as a sentence of ours."""
    text, _, at = str(error).partition(" - at `$")
    path = at.rstrip("`").lstrip(".")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", text):
        param = f"{path}.{missing[1]}".lstrip(".")
        return InvalidRequest(f"{param} is missing; it must be {_expected(body, param)}", param)
    value: Any = raw
    for step in re.findall(r"\w+", path):
        value = value[int(step)] if isinstance(value, list) else value[step]
    told = shown_word(value) if _describe(body, path).words else shown(value)
    return InvalidRequest(f"{path} must be {_expected(body, path)}, not {told}", path)


class Described(NamedTuple):
    """A field: what it must be, the Struct inside if there is one, and whether it takes one of a few words."""

    sentence: str = ""
    inner: type | None = None
    words: bool = False


def _describe(body: type, path: str) -> Described:
    """The nearest description on the way to a field."""
    found = Described("what the API describes")
    for name in re.findall(r"[A-Za-z_]+", path):
        found = _descriptions(body)[name]
        body = found.inner or body
    return found


def _expected(body: type, path: str) -> str:
    return "an object" if path.endswith("]") else _describe(body, path).sentence


@cache
def _descriptions(body: type) -> dict[str, Described]:
    """For each field."""

    def walk(hint: Any) -> Described:
        described, words = "", get_origin(hint) is Literal
        inner = hint if isinstance(hint, type) and issubclass(hint, msgspec.Struct) else None
        for part in () if words else get_args(hint):
            if isinstance(part, Meta):
                described = part.description or described
            else:
                deeper = walk(part)
                described, inner, words = described or deeper.sentence, inner or deeper.inner, words or deeper.words
        return Described(described, inner, words)

    return {name: walk(hint) for name, hint in get_type_hints(body, include_extras=True).items()}
