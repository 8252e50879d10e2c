"""`/tokenize` and `/detokenize`, as vLLM's users know them: what the model's tokenizer makes of a prompt, and back."""

from typing import Any

import msgspec
from msgspec.structs import replace

from kvferry.common.errors import InvalidRequest
from kvferry.router.bodies import NEUTRAL_TOKENIZE, DetokenizeBody, TokenizeBody
from kvferry.router.fields import parse_json
from kvferry.router.limits import Limits
from kvferry.router.openai import check_prompt_chars, conversation, convert
from kvferry.router.quota import Grant
from kvferry.router.text import Tokenizer, check_token_ids
from kvferry.router.values import check_prompt_tokens, token_ids

OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class Tokenized(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str


def parse_tokenize(body: bytes, limits: Limits) -> TokenizeBody:
    """Raises InvalidRequest."""
    asked = convert(parse_json(body, limits), TokenizeBody, NEUTRAL_TOKENIZE, limits)
    if (asked.prompt is None) == (asked.messages is None):
        fault = "is missing, and so is messages" if asked.prompt is None else "and messages are both there"
        raise InvalidRequest(f"prompt {fault}; send one of them", "prompt")
    if asked.messages is None:
        for name in OF_MESSAGES:
            if getattr(asked, name):
                raise InvalidRequest(f"{name} is only allowed together with messages", name)
    check_prompt_chars([prompt_of(asked)], field_of(asked), limits)
    return asked


def prompt_of(asked: TokenizeBody) -> Any:
    """Raises InvalidRequest."""
    return asked.prompt if asked.messages is None else conversation(asked)


def field_of(asked: TokenizeBody) -> str:
    return "prompt" if asked.messages is None else "messages"


def parse_detokenize(body: bytes, limits: Limits) -> DetokenizeBody:
    """Raises InvalidRequest."""
    asked = convert(parse_json(body, limits), DetokenizeBody, {}, limits)
    check_prompt_tokens(len(asked.tokens), "tokens", limits)
    if asked.tokens:
        asked = replace(asked, tokens=token_ids(asked.tokens, "tokens", "a list of token ids"))
    return asked


async def tokenize(
    asked: TokenizeBody, tokenizer: Tokenizer, max_model_len: int, limits: Limits, grant: Grant, tenant: str
) -> Tokenized:
    """Raises InvalidRequest, and RateLimited: its tokens count as those of any prompt."""
    (tokens,) = await tokenizer.encode([prompt_of(asked)], asked.add_special_tokens, limits, tenant)
    check_prompt_tokens(len(tokens), field_of(asked), limits)
    grant.take_prompts([len(tokens)], 0)
    names = None
    if asked.return_token_strs:
        names = await tokenizer.aside(len(tokens), lambda: tokenizer.names(tokens), tenant)
    return Tokenized(len(tokens), max_model_len, tokens.tolist(), names)


async def detokenize(asked: DetokenizeBody, tokenizer: Tokenizer, vocab_size: int, tenant: str) -> Detokenized:
    """The text, special tokens too. Raises InvalidRequest."""
    if asked.tokens:
        check_token_ids(asked.tokens, vocab_size, "tokens")
    return Detokenized(await tokenizer.aside(len(asked.tokens), lambda: tokenizer.decode_all(asked.tokens), tenant))
