"""`/openapi.json`: the API as a document, made from the Structs that parse it and the rules that the limits set.

Whatever the document does not allow is refused. Not all that it allows is taken: it cannot say how fields go together
(`min_tokens` is at most `max_tokens`, a prompt fits the model), and then the answer is a 400 that says it.
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec

from kvferry.common.errors import OUTCOMES, Outcome
from kvferry.router import bodies
from kvferry.router.answers import ChatAnswer, CompletionAnswer, ErrorAnswer, Model, ModelList
from kvferry.router.fields import ANYTHING
from kvferry.router.limits import Limits
from kvferry.router.probes import Told
from kvferry.router.tokens import Detokenized, Tokenized
from kvferry.router.values import rules

Schema = dict[str, Any]

REF = "#/components/schemas/{name}"
ASKED = {
    bodies.CompletionBody: bodies.NEUTRAL_COMPLETION,
    bodies.ChatBody: bodies.NEUTRAL_CHAT,
    bodies.TokenizeBody: bodies.NEUTRAL_TOKENIZE,
    bodies.DetokenizeBody: {},
    bodies.StreamOptions: bodies.NEUTRAL_STREAM,
    bodies.MessageBody: bodies.NEUTRAL_MESSAGE,
    bodies.TextPart: bodies.NEUTRAL_PART,
}
ANSWERS = (CompletionAnswer, ChatAnswer, ErrorAnswer, Model, ModelList, Tokenized, Detokenized, Told)
EVENT = {  # of a stream: a chunk as JSON, then `[DONE]`, or an ErrorAnswer in its place
    "type": "object",
    "properties": {"event": {"enum": ["message", "error"]}, "data": {"type": "string"}},
    "required": ["data"],
}
POSTED = (413, 408)


@cache
def openapi(limits: Limits) -> Mapping[str, Any]:
    """The document, of JSON's own types."""
    _, schemas = msgspec.json.schema_components([*ASKED, *ANSWERS], ref_template=REF)
    for body, neutral in ASKED.items():
        _complete(schemas[body.__name__], neutral, limits)
    schemas["MessageBody"] |= {
        "if": {"properties": {"role": {"const": "assistant"}}},
        "else": {"properties": {"content": {"not": {"type": "null"}}}, "required": ["content"]},
    }
    schemas["TextPart"]["oneOf"] = [
        {"properties": {"type": {"const": one}, one: {"type": "string"}, other: {"type": "null"}}, "required": [one]}
        for one, other in (("text", "refusal"), ("refusal", "text"))
    ]
    schemas["TokenizeBody"]["oneOf"] = [
        {"properties": {name: {"not": {"type": "null"}}}, "required": [name]} for name in ("prompt", "messages")
    ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvferry", "version": version("kvferry"), "license": {"name": "Apache-2.0"}},
        "security": [{"key": []}, {}],
        "paths": _paths(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _complete(schema: Schema, neutral: Mapping[str, tuple[Any, ...]], limits: Limits) -> None:
    """What the Struct does not say of a body: the limits, and the neutral values of fields that are not supported."""
    properties = schema["properties"]
    required = schema.get("required", [])
    for name, rule in rules(limits).items():
        if name in properties and not (name == "prompt" and name not in required):
            if name == "logprobs" and "anyOf" in properties[name]:
                continue  # a chat's, which is true or false
            told = {"description": rule.sentence, **rule.schema}
            properties[name] = told if name in required else _or_null(told)
    for name, accepted in neutral.items():
        free = any(value is ANYTHING for value in accepted)
        properties[name] = {} if free else {"enum": [*accepted, None]}
    schema["additionalProperties"] = False


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}], "default": None}


def _paths() -> Schema:
    generating = {
        "/v1/completions": ("completions", "CompletionBody", "CompletionAnswer"),
        "/v1/chat/completions": ("chat", "ChatBody", "ChatAnswer"),
    }
    paths: Schema = {}
    for path, (name, body, answer) in generating.items():
        content = _json(answer) | {"text/event-stream": {"schema": EVENT}}
        paths[path] = {"post": _operation(name, content, body, 401, 404, 429, 500, 503, 504)}
    paths["/tokenize"] = {"post": _operation("tokenize", _json("Tokenized"), "TokenizeBody", 401, 404, 429, 503)}
    paths["/detokenize"] = {
        "post": _operation("detokenize", _json("Detokenized"), "DetokenizeBody", 401, 404, 429, 503)
    }
    paths["/v1/models"] = {"get": _operation("models", _json("ModelList"), None, 401)}
    one = _operation("model", _json("Model"), None, 401, 404, 503)
    one["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    paths["/v1/models/{id}"] = {"get": one}
    for path, methods, *refusals in (("health", ("get",)), ("ready", ("get",), 503), ("ping", ("get", "post"), 503)):
        paths[f"/{path}"] = {
            method: _operation(path if method == "get" else f"{method}_{path}", _json("Told"), None, *refusals)
            for method in methods
        }
    told = {"type": "object", "properties": {"version": {"type": "string"}}, "required": ["version"]}
    paths["/version"] = {"get": _operation("version", {"application/json": {"schema": told}}, None)}
    return paths


def _operation(name: str, content: Schema, body: str | None, *refusals: int) -> Schema:
    """Any request may be refused for its form."""
    operation: Schema = {"operationId": name, "responses": {"200": {"description": "OK", "content": content}}}
    if body:
        operation["requestBody"] = {"required": True, "content": _json(body)}
        refusals = (*refusals, *POSTED)
    for status in sorted({400, 415, 417, 431, *refusals}):
        operation["responses"][str(status)] = _refusal(status)
    return operation


def _refusal(status: int) -> Schema:
    outcomes = [outcome for outcome in OUTCOMES.values() if outcome.http == status]
    refusal: Schema = {"description": " or ".join(map(_code, outcomes)), "content": _json("ErrorAnswer")}
    if any(outcome.retry_after_s is not None for outcome in outcomes):
        refusal["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}
    return refusal


def _code(outcome: Outcome) -> str:
    return outcome.code


def _json(name: str) -> Schema:
    return {"application/json": {"schema": {"$ref": REF.format(name=name)}}}
