"""What a client gets: response bodies in OpenAI's shapes, as JSON bytes.

One `Answer` builds every body of one request, so the id and the time of creation are the same throughout a stream.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from kvferry.common.errors import KvferryError, outcome_of
from kvferry.router.openai import Kind


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


class Answer:
    """The bodies of one request's answer. `include_usage`: whether a stream's chunks have a `usage` field, null in
    all but the one that `usage_chunk` makes. `prompt_token_ids`: unless None, these go out once, as vLLM has them (in a
    completion's choice, beside a chat's choices), and every choice tells the `token_ids` of its text."""

    def __init__(
        self,
        kind: Kind,
        model: str,
        request_id: str,
        created: int,
        include_usage: bool = False,
        prompt_token_ids: Sequence[int] | None = None,
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
        self._prompt_ids = {} if prompt_token_ids is None else {"prompt_token_ids": prompt_token_ids}

    def whole(self, text: str, token_ids: Sequence[int], finish_reason: str, usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
        ids = self._ids(token_ids)
        if self._kind == "completion":
            choice = _text_choice(text, finish_reason) | ids | self._prompt_ids
            return msgspec.json.encode(self._chunk | {"choices": [choice], "usage": usage})
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason} | ids
        whole = {"object": "chat.completion", "choices": [choice], "usage": usage} | self._prompt_ids
        return msgspec.json.encode(self._chunk | whole)

    def opening_chunk(self) -> bytes | None:
        """What a stream begins with, before there is any text: a chat's role, and the prompt's token ids if they were
        asked for. None when that is nothing."""
        if self._kind == "completion":
            choice = _text_choice("", None) | self._ids(()) | self._prompt_ids
            return self._stream_chunk(choice) if self._prompt_ids else None
        choice = _delta_choice({"role": "assistant", "content": ""}, None) | self._ids(())
        return self._stream_chunk(choice, self._prompt_ids)

    def text_chunk(self, text: str, token_ids: Sequence[int]) -> bytes | None:
        """What is new. None when that is nothing a client could see."""
        ids = self._ids(token_ids)
        if not text and not (ids and token_ids):
            return None
        choice = _text_choice(text, None) if self._kind == "completion" else _delta_choice({"content": text}, None)
        return self._stream_chunk(choice | ids)

    def last_chunk(self, finish_reason: str) -> bytes:
        """The chunk with the finish reason and no text."""
        choice = _text_choice("", finish_reason) if self._kind == "completion" else _delta_choice({}, finish_reason)
        return self._stream_chunk(choice | self._ids(()))

    def usage_chunk(self, usage: Usage) -> bytes:
        """The chunk after the last, with no choices."""
        return msgspec.json.encode(self._chunk | {"choices": [], "usage": usage})

    def _ids(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": token_ids} if self._prompt_ids else {}

    def _stream_chunk(self, choice: dict[str, Any], beside: dict[str, Any] | None = None) -> bytes:
        return msgspec.json.encode(self._chunk | {"choices": [choice]} | (beside or {}) | self._chunk_end)


def _text_choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _delta_choice(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


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


def models_list(models: Sequence[Model]) -> bytes:
    return msgspec.json.encode({"object": "list", "data": models})


def error_body(error: BaseException) -> bytes:
    """OpenAI's error shape. An exception that is not ours is a bug, and its text stays in the log."""
    outcome = outcome_of(error)
    message = str(error) if isinstance(error, KvferryError) else "internal error; the log has the cause"
    fields = {
        "message": message,
        "type": outcome.kind,
        "param": getattr(error, "param", None) if isinstance(error, KvferryError) else None,
        "code": outcome.code,
    }
    return msgspec.json.encode({"error": fields})
