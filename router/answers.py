"""What a client gets: response bodies in OpenAI's shapes, as JSON bytes.

One `Answer` builds every body of one request, so the id and the time of creation are the same throughout a stream.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvferry.common.errors import KvferryError, outcome_of
from kvferry.router.accounting import Record
from kvferry.router.choices import Part
from kvferry.router.logprobs import Told
from kvferry.router.openai import Kind

Shape = Callable[[Sequence[Told]], dict[str, Any]]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`cached_tokens`: prompt tokens that nobody computed for this request. `kvferry`: our extension, where the
    prompt's tokens came from and what it took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    kvferry: dict[str, Any] | None = None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "kvferry"
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Model]


class ErrorFields(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """`missing`: of a router that is not ready, what it waits for."""

    error: ErrorFields
    missing: list[str] = []


class TextChoice(msgspec.Struct, frozen=True):
    """What is always there; `Answer` adds what was asked for."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str
    stop_reason: str | int | None


class Said(msgspec.Struct, frozen=True):
    role: str
    content: str
    refusal: None


class ChatChoice(msgspec.Struct, frozen=True):
    """What is always there; `Answer` adds what was asked for."""

    index: int
    message: Said
    logprobs: dict[str, Any] | None
    finish_reason: str
    stop_reason: str | int | None


class CompletionAnswer(msgspec.Struct, frozen=True):
    """An answer that is not streamed."""

    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ChatAnswer(msgspec.Struct, frozen=True):
    """An answer that is not streamed."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Answer:
    """The bodies of one request's answer. `include_usage`: whether a stream's chunks have a `usage` field, null in
    all but the one that `usage_chunk` makes. `logprobs`: what is told of tokens, in the API's shape; None where it was
    not asked for. `prompt_token_ids`, of each prompt: unless None, they go out once for each choice, as vLLM has them
    (in a completion's choice, beside a chat's choices), and every choice tells the `token_ids` of its text. Each prompt
    has `n` choices.
    """

    def __init__(
        self,
        kind: Kind,
        model: str,
        request_id: str,
        created: int,
        include_usage: bool = False,
        logprobs: Shape | None = None,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        n: int = 1,
    ):
        self.id = f"{'cmpl' if kind == 'completion' else 'chatcmpl'}-{request_id}"
        self._kind = kind
        self._chunk: dict[str, Any] = {
            "id": self.id,
            "object": "text_completion" if kind == "completion" else "chat.completion.chunk",
            "created": created,
            "model": model,
        }
        self._chunk_end = {"usage": None} if include_usage else {}
        self._logprobs, self._prompt_token_ids, self._n = logprobs, prompt_token_ids, n
        self._opened: set[int] = set()

    def whole(self, choices: Sequence[Part], usage: Usage, prompt_logprobs: Sequence[Any] | None = None) -> bytes:
        """The body of an answer that is not streamed. `prompt_logprobs`, of each prompt, stand where vLLM has them."""
        if self._kind == "completion":
            told = [self._completion_choice(part, prompt_logprobs) for part in choices]
            return msgspec.json.encode(self._chunk | {"choices": told, "usage": usage})
        beside = self._prompt_ids(0)
        if prompt_logprobs is not None:
            beside["prompt_logprobs"] = prompt_logprobs[0]
        told = [self._chat_choice(part) for part in choices]
        whole = {"object": "chat.completion", "choices": told, "usage": usage} | beside
        return msgspec.json.encode(self._chunk | whole)

    def _completion_choice(self, part: Part, prompt_logprobs: Sequence[Any] | None) -> dict[str, Any]:
        choice = self._text_choice(part.index, part.text, part, part) | self._prompt_ids(part.index)
        return (
            choice if prompt_logprobs is None else choice | {"prompt_logprobs": prompt_logprobs[part.index // self._n]}
        )

    def _chat_choice(self, part: Part) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        told = {"index": part.index, "message": message, "logprobs": self._told(part)}
        return told | _end(part) | self._ids(part.token_ids)

    def chunks(self, part: Part) -> list[bytes]:
        """What a stream says of a part: nothing where a client could see nothing. Before a choice's first part comes a
        chunk with a chat's role, and the prompt's token ids if they were asked for; after its last part one with the
        finish reason and nothing else."""
        chunks = []
        if part.index not in self._opened:
            self._opened.add(part.index)
            chunks += self._opening(part.index)
        if part.text or part.told or (part.token_ids and self._prompt_token_ids is not None):
            chunks.append(self._stream_chunk(self._new(part.index, part.text, part, None)))
        if part.finish_reason:
            chunks.append(self._stream_chunk(self._new(part.index, "", None, part)))
        return chunks

    def _opening(self, index: int) -> list[bytes]:
        prompt_ids = self._prompt_ids(index)
        if self._kind == "completion":
            choice = self._new(index, "", None, None) | prompt_ids
            return [self._stream_chunk(choice)] if prompt_ids else []
        choice = _delta_choice(index, {"role": "assistant", "content": ""}, None, None) | self._ids(())
        return [self._stream_chunk(choice, prompt_ids if index == 0 else None)]

    def usage_chunk(self, usage: Usage) -> bytes:
        """The chunk after the last, with no choices."""
        return msgspec.json.encode(self._chunk | {"choices": [], "usage": usage})

    def _new(self, index: int, text: str, part: Part | None, last: Part | None) -> dict[str, Any]:
        """A choice of a chunk; of `part` its tokens and what is told of them, of `last` why the choice ended."""
        if self._kind == "completion":
            return self._text_choice(index, text, part, last)
        delta = {} if last else {"content": text}
        return _delta_choice(index, delta, self._told(part), last) | self._ids(part.token_ids if part else ())

    def _text_choice(self, index: int, text: str, part: Part | None, last: Part | None) -> dict[str, Any]:
        told = {"index": index, "text": text, "logprobs": self._told(part)} | _end(last)
        return told | self._ids(part.token_ids if part else ())

    def _told(self, part: Part | None) -> dict[str, Any] | None:
        return self._logprobs(part.told) if self._logprobs and part and part.told else None

    def _ids(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {} if self._prompt_token_ids is None else {"token_ids": token_ids}

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        if self._prompt_token_ids is None:
            return {}
        return {"prompt_token_ids": list(self._prompt_token_ids[index // self._n])}

    def prompt_ids_with(self, part: Part) -> int:
        """How many of its prompt's token ids go out with a part."""
        if self._prompt_token_ids is None or part.index in self._opened:
            return 0
        return len(self._prompt_token_ids[part.index // self._n])

    def _stream_chunk(self, choice: dict[str, Any], beside: dict[str, Any] | None = None) -> bytes:
        return msgspec.json.encode(self._chunk | {"choices": [choice]} | (beside or {}) | self._chunk_end)


def _delta_choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, last: Part | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs} | _end(last)


def _end(last: Part | None) -> dict[str, Any]:
    """Why a choice ended, as its last part says."""
    return {"finish_reason": last and last.finish_reason, "stop_reason": last and last.stop_reason}


def usage_of(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int, kvferry: dict[str, Any] | None = None
) -> Usage:
    """`kvferry` must consist of JSON's own types."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens),
        kvferry=kvferry,
    )


def usage_of_all(records: Sequence[Record]) -> Usage:
    """What the prompts of a request took, together. A prompt counts once, however many choices it has."""
    return usage_of(
        sum(record.prompt_tokens for record in records),
        sum(record.output_tokens for record in records),
        sum(record.reused for record in records),
        _summed([record.as_dict() for record in records]),
    )


def _summed(accounts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accounts of the same shape, number by number."""
    return {
        name: _summed([account[name] for account in accounts])
        if isinstance(first, dict)
        else sum(account[name] for account in accounts)
        for name, first in accounts[0].items()
    }


def encoded(value: object) -> bytes:
    return msgspec.json.encode(value)


def models_list(models: Sequence[Model]) -> bytes:
    return msgspec.json.encode(ModelList(data=list(models)))


def error_body(error: BaseException, missing: Sequence[str] = ()) -> bytes:
    """OpenAI's error shape. An exception that is not ours is a bug, and its text stays in the log."""
    outcome = outcome_of(error)
    message = str(error) if isinstance(error, KvferryError) else "internal error; the log has the cause"
    param = getattr(error, "param", None) if isinstance(error, KvferryError) else None
    return msgspec.json.encode(ErrorAnswer(ErrorFields(message, outcome.kind, param, outcome.code), list(missing)))
