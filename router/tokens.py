"""`/tokenize` and `/detokenize`, as vLLM's users know them: what the model's tokenizer makes of a prompt, and back."""

from typing import Any

import msgspec

from kvferry.common.errors import InvalidRequest
from kvferry.router.bodies import NEUTRAL_TOKENIZE, DetokenizeBody, TokenizeBody
from kvferry.router.fields import parse_json
from kvferry.router.limits import Limits
from kvferry.router.openai import check_prompt_chars, check_prompt_tokens, conversation, convert
from kvferry.router.text import Tokenizer, check_token_ids
from kvferry.router.values import token_ids

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
    asked = convert(parse_json(body, limits.json_depth), TokenizeBody, NEUTRAL_TOKENIZE)
    if (asked.prompt is None) == (asked.messages is None):
        fault = "is missing, and so is messages" if asked.prompt is None else "and messages are both there"
        raise InvalidRequest(f"prompt {fault}; send one of them", "prompt")
    if asked.messages is None:
        for name in OF_MESSAGES:
            if getattr(asked, name):
                raise InvalidRequest(f"{name} is only allowed together with messages", name)
    return asked


def parse_detokenize(body: bytes, limits: Limits) -> DetokenizeBody:
    """Raises InvalidRequest."""
    asked = convert(parse_json(body, limits.json_depth), DetokenizeBody, {})
    if asked.tokens:
        token_ids(asked.tokens, "tokens", "a list of token ids")
    check_prompt_tokens(len(asked.tokens), "tokens", limits)
    return asked


async def tokenize(asked: TokenizeBody, tokenizer: Tokenizer, max_model_len: int, limits: Limits) -> Tokenized:
    """Raises InvalidRequest."""
    prompt: Any = asked.prompt if asked.messages is None else conversation(asked)
    check_prompt_chars([prompt], "prompt" if asked.messages is None else "messages", limits)
    tokens = await tokenizer.encode(prompt, asked.add_special_tokens)
    check_prompt_tokens(len(tokens), "prompt" if asked.messages is None else "messages", limits)
    names = tokenizer.names(tokens) if asked.return_token_strs else None
    return Tokenized(len(tokens), max_model_len, tokens, names)


def detokenize(asked: DetokenizeBody, tokenizer: Tokenizer, vocab_size: int) -> Detokenized:
    """The text, special tokens too. Raises InvalidRequest."""
    if asked.tokens:
        check_token_ids(asked.tokens, vocab_size, "tokens")
    return Detokenized(tokenizer.decode_all(asked.tokens))
