"""What the fields of a request may be. A value of another kind is refused in one sentence, "FIELD must be ...", that
repeats no text of the client's but a word where one of a few is expected.

A `description` completes that sentence. What the limits bound is Any here: its sentence and its JSON schema are in
`rules`, and a function below checks it.
"""

import re
from array import array
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from kvferry.common.errors import InvalidRequest
from kvferry.common.values import counted
from kvferry.router.limits import Limits

MAX_SALT_CHARS = 256
TEXT = {"type": "string"}
TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")
WORD = re.compile("[A-Za-z0-9_.-]{1,32}")
MAX_TOKEN_ID = 2**32 - 1
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PROMPTS = "a string, a list of token ids, or a list of several prompts that are all one or all the other"

Flag = Annotated[bool, Meta(description="true or false")]
ModelName = Annotated[str, Meta(min_length=1, description="the name of a model")]
Count = Annotated[int, Meta(ge=1, lt=2**31, description="a whole number of at least 1")]
MaxTokens = Annotated[int, Meta(ge=0, lt=2**31, description="a whole number of at least 1")]
MinTokens = Annotated[int, Meta(ge=0, lt=2**31, description="a whole number of at least 0")]
Temperature = Annotated[float, Meta(ge=0, le=2, description="a number from 0 to 2")]
TopP = Annotated[float, Meta(gt=0, le=1, description="a number above 0, up to 1")]
TopK = Annotated[int, Meta(ge=-1, lt=2**31, description="a whole number of at least 1, or 0 or -1 for off")]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="a whole number of at most 64 bits")]
Penalty = Annotated[float, Meta(ge=-2, le=2, description="a number from -2 to 2")]
Repetition = Annotated[float, Meta(ge=0.01, le=100, description="a number from 0.01 to 100, 1 for off")]
MinP = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
Seconds = Annotated[float, Meta(gt=0, description="a number of seconds above 0")]
Salt = Annotated[str, Meta(max_length=MAX_SALT_CHARS, description=f"a string of up to {MAX_SALT_CHARS} characters")]
Text = Annotated[str, Meta(description="a string")]
Priority = Annotated[
    int, Meta(ge=-(2**31), le=2**31 - 1, description="a whole number of at most 32 bits, of which the lower goes first")
]
Role = Annotated[
    Literal["system", "developer", "user", "assistant", "tool", "function"],
    Meta(description=f"one of {', '.join(ROLES)}"),
]
Bounded = Annotated[Any, Meta(description="what the rules say")]
PromptValue = Annotated[str | list[Any], Meta(description=PROMPTS)]


class Rule(NamedTuple):
    """What a field must be: the end of a sentence, and a JSON schema."""

    sentence: str
    schema: dict[str, Any]


def of_chars(most: int) -> str:
    return "1 character" if most == 1 else f"1 to {most} characters"


@cache
def rules(limits: Limits) -> dict[str, Rule]:
    """Of each field, by its name, that the limits bound."""
    token = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
    tokens = {"type": "array", "items": token, "minItems": 1}
    stop = {"type": "string", "minLength": 1, "maxLength": limits.stop_chars}
    word = {"type": "string", "minLength": 1, "maxLength": limits.bad_word_chars, "pattern": r"\S"}
    likeliest = Rule(
        f"a whole number from 0 to {limits.logprobs}", {"type": "integer", "minimum": 0, "maximum": limits.logprobs}
    )
    batches = [{"type": "array", "items": one, "minItems": 1, "maxItems": limits.prompts}
               for one in ({"type": "string"}, tokens)]  # fmt: skip
    turns, parts = ({"type": "array", "items": {"$ref": f"#/components/schemas/{name}"}, "maxItems": most}
                    for name, most in (("MessageBody", limits.messages), ("TextPart", limits.parts)))  # fmt: skip
    return {
        "messages": Rule(f"a list of 1 to {counted(limits.messages, 'message')}", turns | {"minItems": 1}),
        "content": Rule(f"a string or a list of up to {counted(limits.parts, 'text part')}", {"anyOf": [TEXT, parts]}),
        "prompt": Rule(PROMPTS, {"anyOf": [{"type": "string"}, tokens, *batches]}),
        "tokens": Rule("a list of token ids", {"type": "array", "items": token, "maxItems": limits.prompt_tokens}),
        "n": Rule(f"a whole number from 1 to {limits.n}", {"type": "integer", "minimum": 1, "maximum": limits.n}),
        "stop": Rule(
            f"a string or a list of up to {counted(limits.stops, 'string')}, each of {of_chars(limits.stop_chars)}",
            {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": limits.stops}]},
        ),
        "stop_token_ids": Rule(
            f"a list of up to {counted(limits.stop_token_ids, 'token id')}",
            {"type": "array", "items": token, "maxItems": limits.stop_token_ids},
        ),
        "bad_words": Rule(
            f"a list of up to {counted(limits.bad_words, 'string')}, each of {of_chars(limits.bad_word_chars)}",
            {"type": "array", "items": word, "maxItems": limits.bad_words},
        ),
        "logit_bias": Rule(
            f"an object of up to {counted(limits.logit_bias, 'token id')}, as strings, each with a number from -100 to "
            "100",
            {
                "type": "object",
                "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                "maxProperties": limits.logit_bias,
            },
        ),
        "logprobs": Rule(likeliest.sentence, {"anyOf": [likeliest.schema, {"const": False}]}),
        "top_logprobs": likeliest,
        "prompt_logprobs": likeliest,
    }


def prompts(value: str | list[Any], limits: Limits) -> tuple[str | array, ...]:
    """One prompt or a batch. Token ids are not yet checked against the vocabulary. How many there are is looked at
    before what they are."""
    if isinstance(value, str):
        return (value,)
    if not value:
        raise InvalidRequest("prompt must have at least one token id, or one prompt", "prompt")
    if isinstance(value[0], str | list) and len(value) > limits.prompts:
        raise InvalidRequest(f"prompt is a batch of {len(value)}; this server takes at most {limits.prompts} in a "
                             "request", "prompt")  # fmt: skip
    count = sum(len(item) if isinstance(item, list) else not isinstance(item, str) for item in value)
    check_prompt_tokens(count, "prompt", limits)
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(token_ids(item, "prompt", PROMPTS) for item in value)
    return (token_ids(value, "prompt", PROMPTS),)


def token_ids(value: list[Any], name: str, expected: str) -> array:
    """As 32 bits each: as Python's own numbers they would take ten times as much."""
    if not value:
        raise InvalidRequest(f"{name} must have at least one token id in each list", name)
    if not all(type(item) is int for item in value):
        raise InvalidRequest(f"{name} must be {expected}, not a list of other things", name)
    if not 0 <= min(value) <= max(value) <= MAX_TOKEN_ID:
        raise InvalidRequest(f"{name} has a token id that is negative or over 32 bits", name)
    return array("I", value)


def check_prompt_tokens(count: int, field: str, limits: Limits) -> None:
    """Raise InvalidRequest for more tokens than a request may have."""
    if count > limits.prompt_tokens:
        raise InvalidRequest(
            f"{field} has {counted(count, 'token')} in all; this server takes at most {limits.prompt_tokens} in a "
            "request",
            field,
        )


def logprobs(name: str, value: Any, limits: Limits) -> int | None:
    """How many of the likeliest tokens to tell."""
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= limits.logprobs:
        raise _wrong(name, rules(limits)[name].sentence, value)
    return value


def stops(value: Any, limits: Limits) -> tuple[str, ...]:
    def fits(stop: Any) -> bool:
        return isinstance(stop, str) and 0 < len(stop) <= limits.stop_chars

    return _items("stop", [value] if isinstance(value, str) else value, limits.stops, fits, limits)


def bad_words(value: Any, limits: Limits) -> tuple[str, ...]:
    def fits(word: Any) -> bool:
        return isinstance(word, str) and 0 < len(word) <= limits.bad_word_chars and not word.isspace()

    return _items("bad_words", value, limits.bad_words, fits, limits)


def stop_tokens(value: Any, limits: Limits) -> tuple[int, ...]:
    """Not yet checked against the vocabulary."""

    def fits(token: Any) -> bool:
        return type(token) is int and 0 <= token <= MAX_TOKEN_ID

    return _items("stop_token_ids", value, limits.stop_token_ids, fits, limits)


def _items(name: str, value: Any, most: int, fits: Callable[[Any], bool], limits: Limits) -> tuple[Any, ...]:
    """A list of at most so many items that all fit."""
    if value is None:
        return ()
    expected = rules(limits)[name].sentence
    if not isinstance(value, list) or len(value) > most:
        raise _wrong(name, expected, value)
    for item in value:
        if not fits(item):
            raise _wrong_item(name, expected, item)
    return tuple(value)


def biases(value: Any, limits: Limits) -> tuple[tuple[int, float], ...]:
    """Of token ids that are not yet checked against the vocabulary. Each is written in one way only, so none comes
    twice."""
    if value is None:
        return ()
    expected = rules(limits)["logit_bias"].sentence
    if not isinstance(value, dict):
        raise _wrong("logit_bias", expected, value)
    if len(value) > limits.logit_bias:
        raise InvalidRequest(f"logit_bias must be {expected}; it has {len(value)}", "logit_bias")
    found = []
    for key, bias in value.items():
        if not TOKEN_ID.fullmatch(key) or int(key) > MAX_TOKEN_ID:
            raise InvalidRequest(f"logit_bias must be {expected}; one key is no token id", "logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise _wrong_item("logit_bias", expected, bias)
        found.append((int(key), float(bias)))
    return tuple(found)


def _wrong(name: str, expected: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {expected}, not {shown(value)}", name)


def _wrong_item(name: str, expected: str, item: Any) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {expected}; one is {shown(item)}", name)


def shown(value: Any) -> str:
    """A value in an error: numbers and the like as they are, text and containers only by kind."""
    if isinstance(value, str):
        return f"a string of {counted(len(value), 'character')}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"
    return msgspec.json.encode(value).decode()


def shown_word(value: Any) -> str:
    """A value in an error about a field that takes one of a few words: one that could be such a word is repeated."""
    return f'"{value}"' if isinstance(value, str) and WORD.fullmatch(value) else shown(value)
