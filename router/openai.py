"""What a client may ask: the bodies of `/v1/completions` and `/v1/chat/completions`, made into one `GenerationRequest`.

Three groups of fields. Those of `CompletionBody` and `ChatBody` are supported. Those of `NEUTRAL` are not, but clients
send them by habit: a value that leaves the answer as it is passes, any other is a 400. The rest is unknown, a 400 too.
A request is never quietly served as another one. Every refusal is an `InvalidRequest` of one sentence that names the
field in `param` and repeats no text of the client's other than field names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvferry.common.errors import InvalidRequest
from kvferry.router import values
from kvferry.router.fields import ANYTHING, Body, parse_json, to_struct, without_neutral
from kvferry.router.limits import DEFAULT_LIMITS, Limits
from kvferry.router.values import (
    BadWords,
    Biases,
    Count,
    Flag,
    LogprobCount,
    LogprobFlag,
    MaxTokens,
    MinP,
    MinTokens,
    ModelName,
    Penalty,
    Priority,
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
)

Kind = Literal["completion", "chat"]

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

    Each of `prompts` gets `n` answers; a chat has one prompt. `max_tokens` None means what the context leaves, 0 that
    only the prompt is told of, which goes with `echo` alone. `logprobs` and `prompt_logprobs` say how many of the
    likeliest tokens are told beside each one; None is none of it. `seed` lies in [0, 2**64); None means that we choose
    one. `top_k` 0 means off. What the client wrote is left out of the repr, so that no log shows it.
    """

    kind: Kind
    model: str
    prompts: tuple[Prompt, ...] = field(repr=False)
    max_tokens: int | None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    priority: int = 0
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
    n: Count | None = None
    best_of: Count | None = None
    prompt_logprobs: LogprobCount | None = None
    priority: Priority | None = None
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
    max_tokens: MaxTokens | None = None
    logprobs: LogprobFlag | None = None
    echo: Flag | None = None


class ChatBody(CommonBody, frozen=True, kw_only=True):
    messages: Annotated[list[MessageBody], Meta(min_length=1, description="a list of at least one message")]
    max_completion_tokens: Count | None = None
    logprobs: Flag | None = None
    top_logprobs: LogprobCount | None = None


NEUTRAL_COMMON: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,), "use_beam_search": (False,), "allowed_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True, False),
    "truncate_prompt_tokens": (), "user": (ANYTHING,),
    "metadata": (ANYTHING,), "store": (False,), "service_tier": ("auto", "default"),
    "safety_identifier": (ANYTHING,), "prompt_cache_key": (ANYTHING,),
}  # fmt: skip
NEUTRAL_COMPLETION = NEUTRAL_COMMON | {
    "suffix": ("",), "add_special_tokens": (True,), "response_format": ({"type": "text"},),
}  # fmt: skip
NEUTRAL_CHAT = NEUTRAL_COMMON | {
    "echo": (False,), "response_format": ({"type": "text"},),
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


def parse_request(kind: Kind, body: bytes, limits: Limits = DEFAULT_LIMITS) -> GenerationRequest:
    """The request in a body. Raises InvalidRequest, and nothing else whatever the bytes."""
    raw = parse_json(body)
    if kind == "completion":
        completion = _convert(raw, CompletionBody, NEUTRAL_COMPLETION)
        request = _request(
            kind,
            completion,
            values.prompts(completion.prompt),
            COMPLETION_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens,
            logprobs=values.completion_logprobs(completion.logprobs),
            echo=bool(completion.echo),
        )
    else:
        chat = _convert(raw, ChatBody, NEUTRAL_CHAT)
        request = _request(
            kind,
            chat,
            (_conversation(chat.messages),),
            _chat_max_tokens(chat),
            logprobs=_chat_logprobs(chat),
            echo=False,
        )
    _check(request, limits)
    return request


def _request(
    kind: Kind,
    body: CommonBody,
    prompts: tuple[Prompt, ...],
    max_tokens: int | None,
    *,
    logprobs: int | None,
    echo: bool,
) -> GenerationRequest:
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequest(f"best_of is not supported yet; leave it out or send {n}, which n is", "best_of")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed together with stream: true", "stream_options")
    return GenerationRequest(
        kind=kind,
        model=body.model,
        prompts=prompts,
        max_tokens=max_tokens,
        n=n,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        echo=echo,
        priority=body.priority or 0,
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


def _check(request: GenerationRequest, limits: Limits) -> None:
    """Raise InvalidRequest where fields that are valid, each by itself, are not so together."""
    n, prompts, max_tokens = request.n, len(request.prompts), request.max_tokens
    if n > limits.n:
        raise InvalidRequest(f"n is {n}; this server gives at most {limits.n} answers to a prompt", "n")
    if prompts > limits.prompts:
        raise InvalidRequest(f"prompt is a batch of {prompts}; this server takes at most {limits.prompts} in a "
                             "request", "prompt")  # fmt: skip
    if n * prompts > limits.choices:
        raise InvalidRequest(f"n is {n} for each of {prompts} prompts; this server gives at most {limits.choices} "
                             "answers a request", "n")  # fmt: skip
    if max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens must be a whole number of at least 1, or 0 together with echo: true",
                             "max_tokens")  # fmt: skip
    if max_tokens is not None and request.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {request.min_tokens} and max_tokens {max_tokens}; it cannot be more",
                             "min_tokens")  # fmt: skip
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs is only told in an answer that is not streamed; leave it or stream out",
                             "prompt_logprobs")  # fmt: skip


def _chat_max_tokens(chat: ChatBody) -> int | None:
    old, new = chat.max_tokens, chat.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(f"max_tokens is {old} and max_completion_tokens {new}; send one of them", "max_tokens")
    return old if new is None else new


def _chat_logprobs(chat: ChatBody) -> int | None:
    if chat.top_logprobs and not chat.logprobs:
        raise InvalidRequest("top_logprobs is only allowed together with logprobs: true", "top_logprobs")
    return (chat.top_logprobs or 0) if chat.logprobs else None


def _conversation(messages: list[MessageBody]) -> Conversation:
    def text(content: str | list[TextPart]) -> str:
        return content if isinstance(content, str) else "\n".join(part.text for part in content)

    return Conversation(tuple(Message(message.role, text(message.content)) for message in messages))


def _convert(raw: dict[str, Any], body: type[Body], neutral: Mapping[str, tuple[Any, ...]]) -> Body:
    fields = without_neutral(raw, body, neutral)
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = without_neutral(options, StreamOptions, NEUTRAL_STREAM, "stream_options.")
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [_message(message, f"messages[{i}].") for i, message in enumerate(messages)]
    return to_struct(fields, body)


def _message(message: Any, path: str) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get("role") in ("tool", "function"):
        raise InvalidRequest(f"{path}role {message['role']!r} is not supported yet", f"{path}role")
    fields = without_neutral(message, MessageBody, NEUTRAL_MESSAGE, path)
    if isinstance(content := fields.get("content"), list):
        for i, part in enumerate(content):
            if isinstance(part, dict):
                without_neutral(part, TextPart, {}, f"{path}content[{i}].", lenient=part.get("type") != "text")
    return fields
