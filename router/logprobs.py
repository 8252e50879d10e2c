"""Log probabilities as clients get them: in the shapes of OpenAI's two APIs, and the prompt's in vLLM's."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvferry.common.sampling import TokenLogprobs
from kvferry.router.text import Tokenizer

LEAST = -9999.0  # JSON has no infinity; what OpenAI says of a token that is very unlikely


@dataclass(frozen=True, slots=True)
class Told:
    """A token of an answer and what is told of it, which is nothing for the first token of a prompt. `offset`: how many
    characters of the answer's text are before it."""

    token_id: int
    logprobs: TokenLogprobs | None
    offset: int


class Offsets:
    """Where each token of a text begins in it, in characters. Of the bytes of one character each begins where it does.
    For ids that decode to valid text this is exact."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0):
        self._tokenizer = tokenizer
        self._at, self._begun = start, False
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def tell(self, token_ids: Sequence[int], logprobs: Iterable[TokenLogprobs | None]) -> tuple[Told, ...]:
        """The next tokens, one entry of `logprobs` each."""
        return tuple(Told(token, told, self._next(token)) for token, told in zip(token_ids, logprobs, strict=True))

    def _next(self, token_id: int) -> int:
        token, offset = self._tokenizer.token(token_id), self._at
        if token.shown and token.data is not None:
            self._at += len(self._characters.decode(token.data))
            if not self._begun:
                self._begun = True
                self._at -= self._tokenizer.leading_space(token_id)
        return offset


def completion_logprobs(told: Sequence[Told], top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """`logprobs` of a completion's choice: lists with one entry a token. The likeliest tokens are `top`, and the token
    itself where it is not one of them."""

    def name(token_id: int) -> str:
        token = tokenizer.token(token_id)
        return token.name if is_text(token.data) else f"bytes:{token.name}"

    def likeliest(one: Told) -> dict[str, float] | None:
        if one.logprobs is None:
            return None
        best = {name(token): bounded(value) for token, value in one.logprobs.top[:top]}
        return best | {name(one.token_id): bounded(one.logprobs.logprob)}

    return {
        "tokens": [name(one.token_id) for one in told],
        "token_logprobs": [None if one.logprobs is None else bounded(one.logprobs.logprob) for one in told],
        "top_logprobs": [likeliest(one) for one in told],
        "text_offset": [one.offset for one in told],
    }


def chat_logprobs(told: Sequence[Told], top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """`logprobs` of a chat's choice, or of its delta; each token's as JSON. Tokens of which nothing is told are left
    out."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = tokenizer.token(token_id)
        data = None if token.data is None else list(token.data)
        return {"token": token.name, "logprob": bounded(logprob), "bytes": data}

    content = [
        packed(
            entry(one.token_id, one.logprobs.logprob)
            | {"top_logprobs": [entry(token, value) for token, value in one.logprobs.top[:top]]}
        )
        for one in told
        if one.logprobs is not None
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    token_ids: Sequence[int], told: Sequence[TokenLogprobs], top: int, tokenizer: Tokenizer
) -> list[msgspec.Raw | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt but the first a dict by token id, as JSON, of the token
    itself and then of the `top` likeliest. Ranks count from 1 there. `told` has one entry for each token but the
    first."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": bounded(logprob), "rank": rank + 1, "decoded_token": tokenizer.token(token_id).name}

    def of(token_id: int, one: TokenLogprobs) -> msgspec.Raw:
        own = {str(token_id): entry(token_id, one.logprob, one.rank)}
        best = {str(token): entry(token, value, rank) for rank, (token, value) in enumerate(one.top[:top])}
        return packed(own | best)

    return [None, *(of(token, one) for token, one in zip(token_ids[1:], told, strict=True))]


def packed(value: dict[str, Any]) -> msgspec.Raw:
    """As JSON already: an answer has a great many of these, and as objects all of them together would be made into JSON
    in one go, and looked through by Python's garbage collector."""
    return msgspec.Raw(msgspec.json.encode(value))


def is_text(data: bytes | None) -> bool:
    """Whether a token's bytes are whole characters. What is no bytes at all has a name that is text."""
    try:
        (data or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def bounded(logprob: float) -> float:
    return max(logprob, LEAST)
