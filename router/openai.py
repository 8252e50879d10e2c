"""What a client may ask for: bodies of `/v1/completions` and `/v1/chat/completions`, made into one `GenerationRequest`.

A request is never quietly served as another one. Every refusal is an `InvalidRequest` of one sentence that names the
field in `param` and repeats no text of the client's other than field names, and the word that was sent where one of a
few is expected.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from kvferry.common.errors import InvalidRequest
from kvferry.common.values import counted
from kvferry.router import values
from kvferry.router.bodies import (
    HINTS_CHAT,
    HINTS_COMPLETION,
    NEUTRAL_CHAT,
    NEUTRAL_COMPLETION,
    NEUTRAL_MESSAGE,
    NEUTRAL_PART,
    NEUTRAL_STREAM,
    ChatBody,
    CommonBody,
    CompletionBody,
    MessageBody,
    StreamOptions,
    TextPart,
)
from kvferry.router.defaults import NO_DEFAULTS, SamplingDefaults
from kvferry.router.fields import NO_HINTS, Body, parse_json, to_struct, without_neutral
from kvferry.router.limits import DEFAULT_LIMITS, Limits

Kind = Literal["completion", "chat"]

COMPLETION_MAX_TOKENS = 16  # OpenAI's default; a chat's is the rest of the context


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is one of `values.ROLES`. `name` and `tool_call_id` are for the template to use or to leave."""

    role: str
    content: str
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """`template_fields`: the client's own variables of the chat template. Not both of `generation_prompt`, that the
    assistant's turn is begun, and `continues`, that the last message is left open."""

    messages: tuple[Message, ...]
    generation_prompt: bool = True
    continues: bool = False
    template_fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chars(self) -> int:
        """Characters of all that the client wrote; of its own variables, those of their JSON, roughly."""
        told = [text or "" for turn in self.messages for text in (turn.content, turn.name, turn.tool_call_id)]
        own = len(msgspec.json.encode(self.template_fields)) if self.template_fields else 0
        return sum(map(len, told)) + own


Prompt = str | array | Conversation  # an array has token ids of 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A valid request. Token ids are not negative but not yet checked against the vocabulary. `model` None means the
    only one that is served.

    Each of `prompts` gets `n` answers; a chat has one prompt. `max_tokens` None means what the context leaves, 0 that
    only the prompt is told of, which goes with `echo` alone. `logprobs` and `prompt_logprobs` say how many of the
    likeliest tokens are told beside each one; None is none of it. `seed` lies in [0, 2**64); None means that we choose
    one. `left_open`: sampling parameters that the client has not sent. `top_k` 0 means off. `timeout_s` None means as
    long as the server allows. `special_tokens`: whether the tokenizer adds its own to a prompt. What the client wrote
    is left out of the repr, so that no log shows it.
    """

    kind: Kind
    model: str | None
    prompts: tuple[Prompt, ...] = field(repr=False)
    max_tokens: int | None
    special_tokens: bool = True
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
    include_stop: bool = False
    skip_special_tokens: bool = True
    cache_salt: str = field(default="", repr=False)
    timeout_s: float | None = None
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    left_open: frozenset[str] = frozenset()

    @property
    def bytes(self) -> int:
        """What its prompts take, roughly: four for a character, of which a token is made at most, or for a token id."""
        return 4 * sum(prompt.chars if isinstance(prompt, Conversation) else len(prompt) for prompt in self.prompts)

    def advised(self, defaults: SamplingDefaults) -> "GenerationRequest":
        """With what the model's makers advise, where the client left it open."""
        return replace(self, **{name: getattr(defaults, name) for name in self.left_open}, left_open=frozenset())


def parse_request(kind: Kind, body: bytes, limits: Limits = DEFAULT_LIMITS) -> GenerationRequest:
    """The request in a body. Raises InvalidRequest, and nothing else whatever the bytes."""
    raw = parse_json(body, limits)
    own: dict[str, Any]
    if kind == "completion":
        asked = convert(raw, CompletionBody, NEUTRAL_COMPLETION, limits, HINTS_COMPLETION)
        own = {
            "prompts": values.prompts(asked.prompt, limits),
            "special_tokens": asked.add_special_tokens is not False,
            "max_tokens": COMPLETION_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens,
            "logprobs": None if asked.logprobs is False else values.logprobs("logprobs", asked.logprobs, limits),
            "echo": bool(asked.echo),
        }
    else:
        asked = convert(raw, ChatBody, NEUTRAL_CHAT, limits, HINTS_CHAT)
        own = {
            "prompts": (conversation(asked),),
            "special_tokens": bool(asked.add_special_tokens),
            "max_tokens": _chat_max_tokens(asked),
            "logprobs": _chat_logprobs(asked, limits),
        }
    request = GenerationRequest(kind=kind, **own, **_common(asked, limits))
    _check(request, limits)
    return request


def _common(body: CommonBody, limits: Limits) -> dict[str, Any]:
    """The fields of a request that both APIs have."""
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequest(f"best_of is not supported yet; leave it out or send {n}, which n is", "best_of")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed together with stream: true", "stream_options")

    def given(name: str) -> Any:
        value = getattr(body, name)
        return getattr(NO_DEFAULTS, name) if value is None else value

    return dict(
        model=body.model,
        n=n,
        prompt_logprobs=values.logprobs("prompt_logprobs", body.prompt_logprobs, limits),
        priority=body.priority or 0,
        min_tokens=body.min_tokens or 0,
        temperature=given("temperature"),
        top_p=given("top_p"),
        top_k=max(given("top_k"), 0),
        min_p=given("min_p"),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=given("repetition_penalty"),
        logit_bias=values.biases(body.logit_bias, limits),
        bad_words=values.bad_words(body.bad_words, limits),
        stop_token_ids=values.stop_tokens(body.stop_token_ids, limits),
        seed=None if body.seed is None else body.seed % 2**64,
        ignore_eos=bool(body.ignore_eos),
        stop=values.stops(body.stop, limits),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        cache_salt=body.cache_salt or "",
        timeout_s=body.timeout,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        return_token_ids=bool(body.return_token_ids),
        left_open=frozenset(name for name in SamplingDefaults.__struct_fields__ if getattr(body, name) is None),
    )


def _check(request: GenerationRequest, limits: Limits) -> None:
    """Raise InvalidRequest where fields that are valid, each by itself, are not so together."""
    n, prompts, max_tokens = request.n, len(request.prompts), request.max_tokens
    if n > limits.n:
        raise InvalidRequest(f"n is {n}; this server gives at most {counted(limits.n, 'answer')} to a prompt", "n")
    if n * prompts > limits.choices:
        raise InvalidRequest(f"n is {n} for each of {counted(prompts, 'prompt')}; this server gives at most "
                             f"{counted(limits.choices, 'answer')} a request", "n")  # fmt: skip
    if max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens must be a whole number of at least 1, or 0 together with echo: true",
                             "max_tokens")  # fmt: skip
    if max_tokens is not None and request.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {request.min_tokens} and max_tokens {max_tokens}; it cannot be more",
                             "min_tokens")  # fmt: skip
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs is only told in an answer that is not streamed; leave it or stream out",
                             "prompt_logprobs")  # fmt: skip
    check_prompt_chars(request.prompts, "prompt" if request.kind == "completion" else "messages", limits)


def check_prompt_chars(prompts: Sequence[Prompt], field: str, limits: Limits) -> None:
    """Raise InvalidRequest for more text than a request may have: to tokenise it keeps others waiting."""
    count = sum(prompt.chars if isinstance(prompt, Conversation) else len(prompt) for prompt in prompts
                if not isinstance(prompt, array))  # fmt: skip
    if count > limits.prompt_chars:
        raise InvalidRequest(
            f"{field} has {counted(count, 'character')} in all; this server takes at most {limits.prompt_chars} in a "
            "request",
            field,
        )


def _chat_max_tokens(chat: ChatBody) -> int | None:
    old, new = chat.max_tokens, chat.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(f"max_tokens is {old} and max_completion_tokens {new}; send one of them", "max_tokens")
    return old if new is None else new


def _chat_logprobs(chat: ChatBody, limits: Limits) -> int | None:
    top = values.logprobs("top_logprobs", chat.top_logprobs, limits)
    if top and not chat.logprobs:
        raise InvalidRequest("top_logprobs is only allowed together with logprobs: true", "top_logprobs")
    return (top or 0) if chat.logprobs else None


def conversation(chat: Any) -> Conversation:
    """That of a `ChatBody` or a `TokenizeBody`. Raises InvalidRequest."""
    continues = bool(chat.continue_final_message)
    if continues and chat.add_generation_prompt is not False:
        raise InvalidRequest(
            "continue_final_message is only allowed together with add_generation_prompt: false",
            "continue_final_message",
        )
    messages = tuple(_turn(message, f"messages[{i}]") for i, message in enumerate(chat.messages))
    prompted = chat.add_generation_prompt is not False
    return Conversation(messages, prompted, continues, chat.chat_template_kwargs or {})


def _turn(message: MessageBody, path: str) -> Message:
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise InvalidRequest(f"{path}.content is missing; it must be a string or a list of text parts",
                                 f"{path}.content")  # fmt: skip
        content = ""
    if message.tool_call_id is not None and message.role != "tool":
        raise InvalidRequest(f"{path}.tool_call_id is only allowed with the role tool", f"{path}.tool_call_id")
    if not isinstance(content, str):
        content = "\n".join(_said(part, f"{path}.content[{i}]") for i, part in enumerate(content))
    return Message(message.role, content, message.name, message.tool_call_id)


def _said(part: TextPart, path: str) -> str:
    """What is in the field of a part's type; nothing may be in the other."""
    for name in ("text", "refusal"):
        if (getattr(part, name) is None) == (name == part.type):
            fault = "is missing; it must be a string" if name == part.type else "is only allowed in a part of that type"
            raise InvalidRequest(f"{path}.{name} {fault}", f"{path}.{name}")
    return getattr(part, part.type)


def convert(
    raw: dict[str, Any],
    body: type[Body],
    neutral: Mapping[str, tuple[Any, ...]],
    limits: Limits,
    hints: Mapping[str, str] = NO_HINTS,
) -> Body:
    """A body's fields, those inside of messages and options too. Raises InvalidRequest."""
    fields = without_neutral(raw, body, neutral, hints=hints)
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = without_neutral(options, StreamOptions, NEUTRAL_STREAM, "stream_options.")
    if isinstance(messages := fields.get("messages"), list):
        _check_messages(messages, limits)
        fields["messages"] = [_message(message, f"messages[{i}].") for i, message in enumerate(messages)]
    return to_struct(fields, body)


def _check_messages(messages: list[Any], limits: Limits) -> None:
    """Raise InvalidRequest for too many, before each of them is looked at."""
    if len(messages) > limits.messages:
        raise InvalidRequest(f"messages has {len(messages)} messages; this server takes at most {limits.messages}",
                             "messages")  # fmt: skip
    contents = [one.get("content") for one in messages if isinstance(one, dict)]
    if (parts := sum(len(one) for one in contents if isinstance(one, list))) > limits.parts:
        raise InvalidRequest(f"messages has {counted(parts, 'text part')} in all; this server takes at most "
                             f"{limits.parts}", "messages")  # fmt: skip


def _message(message: Any, path: str) -> Any:
    if not isinstance(message, dict):
        return message
    fields = without_neutral(message, MessageBody, NEUTRAL_MESSAGE, path)
    if isinstance(content := fields.get("content"), list):
        for i, part in enumerate(content):
            if isinstance(part, dict):
                lenient = part.get("type") not in ("text", "refusal")
                without_neutral(part, TextPart, NEUTRAL_PART, f"{path}content[{i}].", lenient)
    return fields
