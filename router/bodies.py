"""The bodies of requests, field by field, and the fields that clients send by habit.

What is in a Struct is supported. What is in a table of neutral fields is not, but a value that leaves the answer as it
is passes; any other is a 400. Everything else is unknown, a 400 too.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvferry.router.fields import ANYTHING
from kvferry.router.values import (
    Bounded,
    Count,
    Flag,
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
    Seconds,
    Seed,
    Temperature,
    Text,
    TopK,
    TopP,
)


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: Flag | None = None


class TextPart(msgspec.Struct, frozen=True):
    """Of its fields, the one that its type names is there. What an assistant said to refuse is text as any other."""

    type: Annotated[Literal["text", "refusal"], Meta(description="text or refusal, the only parts supported yet")]
    text: Text | None = None
    refusal: Text | None = None


class MessageBody(msgspec.Struct, frozen=True):
    """Only an assistant's message may be without content."""

    role: Role
    content: Annotated[str | list[TextPart], Meta(description="a string or a list of text parts")] | None = None
    name: Text | None = None
    tool_call_id: Text | None = None


Messages = Annotated[list[MessageBody], Meta(min_length=1, description="a list of at least one message")]
TemplateFields = Annotated[dict[str, Any], Meta(description="an object")]


class CommonBody(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelName | None = None
    max_tokens: Count | None = None
    n: Count | None = None
    best_of: Count | None = None
    prompt_logprobs: Bounded = None
    priority: Priority | None = None
    min_tokens: MinTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: Bounded = None
    bad_words: Bounded = None
    stop_token_ids: Bounded = None
    seed: Seed | None = None
    ignore_eos: Flag | None = None
    stop: Bounded = None
    include_stop_str_in_output: Flag | None = None
    skip_special_tokens: Flag | None = None
    add_special_tokens: Flag | None = None
    cache_salt: Salt | None = None
    timeout: Seconds | None = None
    return_token_ids: Flag | None = None
    stream: Flag | None = None
    stream_options: Annotated[StreamOptions, Meta(description="an object")] | None = None


class CompletionBody(CommonBody, frozen=True, kw_only=True):
    prompt: PromptValue
    max_tokens: MaxTokens | None = None
    logprobs: Bounded = None
    echo: Flag | None = None


class ChatBody(CommonBody, frozen=True, kw_only=True):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: Flag | None = None
    top_logprobs: Bounded = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    chat_template_kwargs: TemplateFields | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """`prompt` or `messages`: one of them."""

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: Flag | None = None
    return_token_strs: Flag | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    chat_template_kwargs: TemplateFields | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelName | None = None
    tokens: Annotated[list[Any], Meta(description="a list of token ids")]


NEUTRAL_COMMON: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,), "use_beam_search": (False,), "early_stopping": (False,), "detokenize": (True,),
    "kv_transfer_params": (), "ec_transfer_params": (), "mm_processor_kwargs": (), "request_id": (ANYTHING,),
    "session_id": (ANYTHING,), "structured_outputs": (), "structural_tag": (), "guided_json": (), "guided_choice": (),
    "guided_regex": (), "guided_grammar": (), "guided_decoding_backend": (), "guided_whitespace_pattern": (),
    "allowed_token_ids": ([],), "logits_processors": ([],), "logprob_token_ids": (), "vllm_xargs": ({},),
    "return_tokens_as_token_ids": (False,), "spaces_between_special_tokens": (True, False),
    "truncate_prompt_tokens": (), "truncation_side": ("left", "right"), "include_reasoning": (True, False),
    "thinking_token_budget": (), "repetition_detection": (), "watermarking": (False,), "stream_interval": (1,),
    "user": (ANYTHING,), "metadata": (ANYTHING,), "store": (False,), "service_tier": ("auto", "default"),
    "safety_identifier": (ANYTHING,), "prompt_cache_key": (ANYTHING,), "prompt_cache_retention": (ANYTHING,),
    "response_format": ({"type": "text"},),
}  # fmt: skip
NEUTRAL_COMPLETION = NEUTRAL_COMMON | {"suffix": ("",), "prompt_embeds": ()}
NEUTRAL_CHAT = NEUTRAL_COMMON | {
    "echo": (False,), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "parallel_tool_calls": (True, False), "modalities": (["text"],), "audio": (),
    "prediction": (), "reasoning_effort": (), "verbosity": ("medium",), "web_search_options": (), "chat_template": (),
    "documents": ([],), "media_io_kwargs": ({},), "moderation": (), "prompt_cache_options": (ANYTHING,),
}  # fmt: skip
NO_TOOLS = "tools are not supported: describe them in a message, and read the call from the answer's text"
HINTS = dict.fromkeys(("tools", "tool_choice", "functions", "function_call"), NO_TOOLS) | {
    "response_format": "say in a message which form the answer shall have",
    "chat_template": "the chat template is that of the model's folder, and chat_template_kwargs are its variables",
}


def elsewhere(path: str, here: type, neutral_here: Mapping[str, Any], there: type) -> dict[str, str]:
    """Hints for the fields that are of another route's body only."""
    only = set(there.__struct_fields__) - {*here.__struct_fields__, *neutral_here}
    return {name: f"{path} has it" for name in only}


HINTS_COMPLETION = elsewhere("/v1/chat/completions", CompletionBody, NEUTRAL_COMPLETION, ChatBody) | HINTS
HINTS_CHAT = elsewhere("/v1/completions", ChatBody, NEUTRAL_CHAT, CompletionBody) | HINTS
NEUTRAL_TOKENIZE: dict[str, tuple[Any, ...]] = {"tools": ([],), "chat_template": ()}
NEUTRAL_STREAM: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}
NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {
    "refusal": (), "audio": (), "tool_calls": ([],), "function_call": (), "reasoning": ("",),
    "reasoning_content": ("",), "annotations": ([],),
}  # fmt: skip
NEUTRAL_PART: dict[str, tuple[Any, ...]] = {"cache_control": (ANYTHING,), "prompt_cache_breakpoint": (ANYTHING,)}
NAMES = frozenset().union(
    *(
        body.__struct_fields__
        for body in (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, StreamOptions, MessageBody, TextPart)
    ),
    *(NEUTRAL_COMPLETION, NEUTRAL_CHAT, NEUTRAL_TOKENIZE, NEUTRAL_STREAM, NEUTRAL_MESSAGE, NEUTRAL_PART),
)
STEP = re.compile(r"\[\d+\]\.?|\.")


def is_known(path: str) -> bool:
    """Whether a field, such as `messages[0].content`, has a name of ours; a client can make up any other."""
    return all(name in NAMES for name in STEP.split(path) if name)
