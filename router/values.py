"""What the fields of a request may be. A value of another kind is refused in one sentence, "FIELD must be ...", that
repeats no text of the client's."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvferry.common.errors import InvalidRequest

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_SALT_CHARS = 256
MAX_BIASES = 1024
MAX_STOP_TOKENS = 128
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_LOGPROBS = 20
TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")
ROLES = ("system", "developer", "user", "assistant")

# A `description` completes the sentence "FIELD must be ...". What is Any is checked by a function below.
STOPS = f"a string or a list of up to {MAX_STOPS} strings, each of 1 to {MAX_STOP_CHARS} characters"
BIASES = f"an object of up to {MAX_BIASES} token ids, as strings, each with a number from -100 to 100"
STOP_TOKENS = f"a list of up to {MAX_STOP_TOKENS} token ids"
PROMPTS = "a string, a list of token ids, or a list of several prompts that are all one or all the other"
LOGPROBS = f"a whole number from 0 to {MAX_LOGPROBS}"
BAD_WORDS = f"a list of up to {MAX_BAD_WORDS} strings, each of 1 to {MAX_BAD_WORD_CHARS} characters"

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
Stops = Annotated[Any, Meta(description=STOPS)]
Biases = Annotated[Any, Meta(description=BIASES)]
StopTokens = Annotated[Any, Meta(description=STOP_TOKENS)]
BadWords = Annotated[Any, Meta(description=BAD_WORDS)]
Salt = Annotated[str, Meta(max_length=MAX_SALT_CHARS, description=f"a string of up to {MAX_SALT_CHARS} characters")]
PromptValue = Annotated[str | list[Any], Meta(description=PROMPTS)]
LogprobCount = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS, description=LOGPROBS)]
LogprobFlag = Annotated[Any, Meta(description=LOGPROBS)]
Priority = Annotated[
    int, Meta(ge=-(2**31), le=2**31 - 1, description="a whole number of at most 32 bits, of which the lower goes first")
]
Role = Annotated[Literal["system", "developer", "user", "assistant"], Meta(description=f"one of {', '.join(ROLES)}")]


def prompts(value: str | list[Any]) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or a batch. Token ids are not yet checked against the vocabulary."""
    if isinstance(value, str):
        return (value,)
    if not value:
        raise InvalidRequest("prompt must have at least one token id, or one prompt", "prompt")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(_token_ids(item) for item in value)
    return (_token_ids(value),)


def _token_ids(value: list[Any]) -> tuple[int, ...]:
    if not value:
        raise InvalidRequest("prompt must have at least one token id in each list", "prompt")
    if not all(type(item) is int for item in value):
        raise InvalidRequest(f"prompt must be {PROMPTS}, not a list of other things", "prompt")
    if not 0 <= min(value) <= max(value) < 2**32:
        raise InvalidRequest("prompt has a token id that is negative or over 32 bits", "prompt")
    return tuple(value)


def completion_logprobs(value: Any) -> int | None:
    """False, which is what a chat's `logprobs` is by default, passes for none."""
    if value is None or value is False:
        return None
    if type(value) is not int or not 0 <= value <= MAX_LOGPROBS:
        raise _wrong("logprobs", LOGPROBS, value)
    return value


def stops(value: Any) -> tuple[str, ...]:
    def fits(stop: Any) -> bool:
        return isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS

    return _items("stop", STOPS, [value] if isinstance(value, str) else value, MAX_STOPS, fits)


def bad_words(value: Any) -> tuple[str, ...]:
    def fits(word: Any) -> bool:
        return isinstance(word, str) and 0 < len(word) <= MAX_BAD_WORD_CHARS and not word.isspace()

    return _items("bad_words", BAD_WORDS, value, MAX_BAD_WORDS, fits)


def stop_tokens(value: Any) -> tuple[int, ...]:
    """Not yet checked against the vocabulary."""

    def fits(token: Any) -> bool:
        return type(token) is int and 0 <= token < 2**32

    return _items("stop_token_ids", STOP_TOKENS, value, MAX_STOP_TOKENS, fits)


def _items(name: str, expected: str, value: Any, most: int, fits: Callable[[Any], bool]) -> tuple[Any, ...]:
    """A list of at most so many items that all fit."""
    if not isinstance(value, list) or len(value) > most:
        raise _wrong(name, expected, value)
    for item in value:
        if not fits(item):
            raise _wrong_item(name, expected, item)
    return tuple(value)


def biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Of token ids that are not yet checked against the vocabulary. Each is written in one way only, so none comes
    twice."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise _wrong("logit_bias", BIASES, value)
    found = []
    for key, bias in value.items():
        if not TOKEN_ID.fullmatch(key) or int(key) >= 2**32:
            raise InvalidRequest(f"logit_bias must be {BIASES}; one key is no token id", "logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise _wrong_item("logit_bias", BIASES, bias)
        found.append((int(key), float(bias)))
    return tuple(found)


def _wrong(name: str, expected: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {expected}, not {shown(value)}", name)


def _wrong_item(name: str, expected: str, item: Any) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {expected}; one is {shown(item)}", name)


def shown(value: Any) -> str:
    """A value in an error: numbers and the like as they are, text and containers only by kind."""
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"
    return msgspec.json.encode(value).decode()
