"""What a client may ask: the bodies of `/v1/completions` and `/v1/chat/completions`, made into one `GenerationRequest`.

Three groups of fields. Those of `CompletionBody` and `ChatBody` are supported. Those of `NEUTRAL` are not, but clients
send them by habit: a value that leaves the answer as it is passes, any other is a 400. The rest is unknown, a 400 too.
A request is never quietly served as another one. Every refusal is an `InvalidRequest` of one sentence that names the
field in `param` and repeats no text of the client's other than field names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta

from kvferry.common.errors import InvalidRequest
from kvferry.router import values
from kvferry.router.values import (
    BadWords,
    Biases,
    Count,
    Flag,
    MinP,
    MinTokens,
    ModelName,
    Penalty,
    PromptValue,
    Repetition,
    Role,
    Salt,
    Seed,
    Stops,
    StopTokens,
    Temperature,
    TopK,
    TopP,
    shown,
)

Kind = Literal["completion", "chat"]
Body = TypeVar("Body", bound=msgspec.Struct)

MAX_NAME_SHOWN = 64
COMPLETION_MAX_TOKENS = 16  # OpenAI's default; a chat's is the rest of the context


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is one of `values.ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]


Prompt = str | tuple[int, ...] | Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A valid request. Token ids are not negative but not yet checked against the vocabulary.

    `max_tokens` None means what the context leaves. `seed` lies in [0, 2**64); None means that we choose one.
    `top_k` 0 means off. What the client wrote is left out of the repr, so that no log shows it.
    """

    kind: Kind
    model: str
    prompt: Prompt = field(repr=False)
    max_tokens: int | None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    bad_words: tuple[str, ...] = field(default=(), repr=False)
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = field(default=(), repr=False)
    cache_salt: str = field(default="", repr=False)
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: Flag | None = None


class TextPart(msgspec.Struct, frozen=True):
    type: Annotated[Literal["text"], Meta(description="text, the only part supported yet")]
    text: Annotated[str, Meta(description="a string")]


class MessageBody(msgspec.Struct, frozen=True):
    role: Role
    content: Annotated[str | list[TextPart], Meta(description="a string or a list of text parts")]


class CommonBody(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelName
    max_tokens: Count | None = None
    min_tokens: MinTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: Biases | None = None
    bad_words: BadWords | None = None
    stop_token_ids: StopTokens | None = None
    seed: Seed | None = None
    ignore_eos: Flag | None = None
    stop: Stops | None = None
    cache_salt: Salt | None = None
    return_token_ids: Flag | None = None
    stream: Flag | None = None
    stream_options: Annotated[StreamOptions, Meta(description="an object")] | None = None


class CompletionBody(CommonBody, frozen=True, kw_only=True):
    prompt: PromptValue


class ChatBody(CommonBody, frozen=True, kw_only=True):
    messages: Annotated[list[MessageBody], Meta(min_length=1, description="a list of at least one message")]
    max_completion_tokens: Count | None = None


ANYTHING = object()
NEUTRAL_COMMON: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "length_penalty": (1,), "use_beam_search": (False,), "allowed_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True, False), "prompt_logprobs": (),
    "truncate_prompt_tokens": (), "priority": (0,), "user": (ANYTHING,),
    "metadata": (ANYTHING,), "store": (False,), "service_tier": ("auto", "default"),
    "safety_identifier": (ANYTHING,), "prompt_cache_key": (ANYTHING,),
}  # fmt: skip
NEUTRAL_COMPLETION = NEUTRAL_COMMON | {
    "logprobs": (False,), "echo": (False,), "suffix": ("",), "add_special_tokens": (True,),
    "response_format": ({"type": "text"},),
}  # fmt: skip
NEUTRAL_CHAT = NEUTRAL_COMMON | {
    "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "response_format": ({"type": "text"},),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (), "chat_template": (),
    "chat_template_kwargs": ({},), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "add_special_tokens": (False,), "documents": ([],), "include_reasoning": (True, False),
}  # fmt: skip
NEUTRAL_STREAM = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}
NEUTRAL_MESSAGE = {
    "name": (), "refusal": (), "audio": (), "tool_calls": ([],), "function_call": (), "tool_call_id": (),
    "reasoning_content": ("",), "annotations": ([],),
}  # fmt: skip


def parse_request(kind: Kind, body: bytes) -> GenerationRequest:
    """The request in a body. Raises InvalidRequest, and nothing else whatever the bytes."""
    raw = _parse_json(body)
    if kind == "completion":
        completion = _convert(raw, CompletionBody, NEUTRAL_COMPLETION)
        max_tokens = COMPLETION_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens
        return _request(kind, completion, _prompt(completion.prompt), max_tokens)
    chat = _convert(raw, ChatBody, NEUTRAL_CHAT)
    return _request(kind, chat, _conversation(chat.messages), _chat_max_tokens(chat))


def _request(kind: Kind, body: CommonBody, prompt: Prompt, max_tokens: int | None) -> GenerationRequest:
    if body.min_tokens and max_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {body.min_tokens} and max_tokens {max_tokens}; it cannot be more",
                             "min_tokens")  # fmt: skip
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed together with stream: true", "stream_options")
    return GenerationRequest(
        kind=kind,
        model=body.model,
        prompt=prompt,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=() if body.logit_bias is None else values.biases(body.logit_bias),
        bad_words=() if body.bad_words is None else values.bad_words(body.bad_words),
        stop_token_ids=() if body.stop_token_ids is None else values.stop_tokens(body.stop_token_ids),
        seed=None if body.seed is None else body.seed % 2**64,
        ignore_eos=bool(body.ignore_eos),
        stop=() if body.stop is None else values.stops(body.stop),
        cache_salt=body.cache_salt or "",
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        return_token_ids=bool(body.return_token_ids),
    )


def _chat_max_tokens(chat: ChatBody) -> int | None:
    old, new = chat.max_tokens, chat.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(f"max_tokens is {old} and max_completion_tokens {new}; send one of them", "max_tokens")
    return old if new is None else new


def _prompt(value: str | list[Any]) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if not value:
        raise InvalidRequest("prompt must have at least one token id", "prompt")
    if all(type(item) is int for item in value):
        if not 0 <= min(value) <= max(value) < 2**32:
            raise InvalidRequest("prompt has a token id that is negative or over 32 bits", "prompt")
        return tuple(value)
    if len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if all(isinstance(item, str) for item in value) or all(isinstance(item, list) for item in value):
        raise InvalidRequest(f"prompt is a batch of {len(value)}, which is not supported yet; send one a request",
                             "prompt")  # fmt: skip
    raise InvalidRequest(f"prompt must be {_expected(CompletionBody, 'prompt')}, not a list of other things", "prompt")


def _conversation(messages: list[MessageBody]) -> Conversation:
    def text(content: str | list[TextPart]) -> str:
        return content if isinstance(content, str) else "\n".join(part.text for part in content)

    return Conversation(tuple(Message(message.role, text(message.content)) for message in messages))


def _parse_json(body: bytes) -> dict[str, Any]:
    """NaN, Infinity, numbers out of range and unpaired surrogates are not JSON and refused here."""
    try:
        raw = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except msgspec.MsgspecError as error:
        detail = str(error).removeprefix("JSON is malformed: ").partition(" - at ")[0].lower()
        raise InvalidRequest(f"the body is not valid JSON: {detail}") from None
    if not isinstance(raw, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {shown(raw)}")
    return raw


def _convert(raw: dict[str, Any], body: type[Body], neutral: Mapping[str, tuple[Any, ...]]) -> Body:
    fields = _without_neutral(raw, body, neutral)
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = _without_neutral(options, StreamOptions, NEUTRAL_STREAM, "stream_options.")
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [_message(message, f"messages[{i}].") for i, message in enumerate(messages)]
    try:
        return msgspec.convert(fields, body)
    except msgspec.ValidationError as error:
        raise _refusal(error, fields, body) from None


def _message(message: Any, path: str) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get("role") in ("tool", "function"):
        raise InvalidRequest(f"{path}role {message['role']!r} is not supported yet", f"{path}role")
    fields = _without_neutral(message, MessageBody, NEUTRAL_MESSAGE, path)
    if isinstance(content := fields.get("content"), list):
        for i, part in enumerate(content):
            if isinstance(part, dict):
                _without_neutral(part, TextPart, {}, f"{path}content[{i}].", lenient=part.get("type") != "text")
    return fields


def _without_neutral(
    raw: dict[str, Any], body: type, neutral: Mapping[str, tuple[Any, ...]], path: str = "", lenient: bool = False
) -> dict[str, Any]:
    """The supported fields of `raw`. Raises for a field that is unknown, or not neutral and not supported; `lenient`
    leaves unknown ones to whoever finds the real fault."""
    supported = {}
    for name, value in raw.items():
        if name in body.__struct_fields__:
            supported[name] = value
        elif name not in neutral:
            if not lenient:
                raise _unknown(name, path, [*body.__struct_fields__, *neutral])
        elif not _is_neutral(value, neutral[name]):
            only = f" or send {msgspec.json.encode(neutral[name][0]).decode()}" if neutral[name] else ""
            raise InvalidRequest(f"{path}{name} is not supported yet; leave it out{only}", path + name)
    return supported


def _is_neutral(value: Any, accepted: tuple[Any, ...]) -> bool:
    return value is None or any(
        one is ANYTHING or (value == one and isinstance(value, bool) == isinstance(one, bool)) for one in accepted
    )


def _unknown(name: str, path: str, known: list[str]) -> InvalidRequest:
    shown = name if len(name) <= MAX_NAME_SHOWN else name[:MAX_NAME_SHOWN] + "..."
    near = get_close_matches(name[:MAX_NAME_SHOWN], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
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
    return InvalidRequest(f"{path} must be {_expected(body, path)}, not {shown(value)}", path)


def _expected(body: type, path: str) -> str:
    """The nearest description on the way to a field."""
    found = "what the API describes"
    for name in re.findall(r"[A-Za-z_]+", path):
        found, inner = _descriptions(body)[name]
        body = inner or body
    return "an object" if path.endswith("]") else found


@cache
def _descriptions(body: type) -> dict[str, tuple[str, type | None]]:
    """For each field its description, and the Struct inside if there is one."""

    def walk(hint: Any) -> tuple[str, type | None]:
        described, inner = "", hint if isinstance(hint, type) and issubclass(hint, msgspec.Struct) else None
        for part in get_args(hint):
            if isinstance(part, Meta):
                described = part.description or described
            else:
                deeper, struct = walk(part)
                described, inner = described or deeper, inner or struct
        return described, inner

    return {name: walk(hint) for name, hint in get_type_hints(body, include_extras=True).items()}
