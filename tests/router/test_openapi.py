"""`/openapi.json` against the parser: what the document does not allow is refused, what it allows is taken."""

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from kvferry.common.errors import InvalidRequest
from kvferry.router.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from kvferry.router.limits import DEFAULT_LIMITS, Limits
from kvferry.router.openai import parse_request
from kvferry.router.openapi import openapi
from kvferry.router.tokens import parse_detokenize, parse_tokenize

TURN = {"role": "user", "content": "p"}
SMALL = Limits(stops=2, stop_chars=3, logit_bias=2, bad_words=2, bad_word_chars=3, stop_token_ids=2, logprobs=3, n=3)
PARSERS = {
    CompletionBody: (lambda body, limits: parse_request("completion", body, limits), {"model": "m", "prompt": "p"}),
    ChatBody: (lambda body, limits: parse_request("chat", body, limits), {"model": "m", "messages": [TURN]}),
    TokenizeBody: (parse_tokenize, {"prompt": "p"}),
    DetokenizeBody: (parse_detokenize, {"tokens": [1]}),
}
# What the document cannot say: fields that only go together with others.
TOGETHER = {
    "best_of", "min_tokens", "max_tokens", "stream_options", "top_logprobs", "continue_final_message", "messages",
    "add_generation_prompt", "chat_template_kwargs", "max_completion_tokens",
}  # fmt: skip


def allowed(body: type, value: Any, limits: Limits) -> bool:
    document = openapi(limits)
    schema = {"$ref": f"#/components/schemas/{body.__name__}", "components": document["components"]}
    return jsonschema_rs.Draft202012Validator(schema).is_valid(value)


def taken(body: type, value: Any, limits: Limits) -> bool:
    try:
        PARSERS[body][0](json.dumps(value).encode(), limits)
    except InvalidRequest:
        return False
    return True


NUMBERS = st.integers(-3, 5) | st.sampled_from(
    [-(2**31) - 1, 2**31, 2**32, 2**63, -101, 100, 101, 0.5, 2.5, -2.5]
)  # no 2.0: to a schema it is an integer
SMALL_JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "a", "abc", "abcd", "text", "auto", "none", "5", "x y"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["0", "1", "05", "a", "type", "text", "include_usage"]), inner, max_size=3)
    ),
    max_leaves=4,
)
PART = st.dictionaries(
    st.sampled_from(["type", "text", "refusal", "cache_control", "x"]),
    st.none() | st.sampled_from(["text", "refusal", "image_url", 3]),
)
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "name", "tool_call_id", "refusal", "x"]),
    SMALL_JSON | st.sampled_from(["user", "tool", "assistant", "function", "robot"]) | st.lists(PART, max_size=2),
)


def names(body: type) -> list[str]:
    return sorted(openapi(SMALL)["components"]["schemas"][body.__name__]["properties"])


@pytest.mark.parametrize("body", PARSERS, ids=lambda body: body.__name__)
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_what_the_document_does_not_allow_is_refused(body, data):
    fields = data.draw(st.dictionaries(st.sampled_from([*names(body), "stopp"]), SMALL_JSON, max_size=3))
    value = (PARSERS[body][1] if data.draw(st.booleans()) else {}) | fields
    if "messages" in names(body) and data.draw(st.booleans()):
        value["messages"] = data.draw(st.lists(MESSAGE, max_size=2))
    if taken(body, value, SMALL):
        event("taken")
        assert allowed(body, value, SMALL), value


@pytest.mark.parametrize("body", PARSERS, ids=lambda body: body.__name__)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_what_the_document_allows_of_one_field_is_taken(body, data):
    name = data.draw(st.sampled_from([name for name in names(body) if name not in TOGETHER]))
    value = PARSERS[body][1] | {name: data.draw(SMALL_JSON)}
    if allowed(body, value, SMALL):
        event("allowed")
        assert taken(body, value, SMALL), value


@settings(max_examples=300, deadline=None)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=2))
def test_what_the_document_allows_of_messages_is_taken(messages):
    value = {"model": "m", "messages": messages}
    unpaired = any(one.get("tool_call_id") is not None and one.get("role") != "tool" for one in messages)
    if allowed(ChatBody, value, SMALL) and not unpaired:
        event("allowed")
        assert taken(ChatBody, value, SMALL)


def test_the_limits_are_in_it():
    def most(limits: Limits) -> int:
        return openapi(limits)["components"]["schemas"]["ChatBody"]["properties"]["n"]["anyOf"][0]["maximum"]

    assert (most(SMALL), most(DEFAULT_LIMITS)) == (3, 64)


def test_every_refusal_has_its_schema():
    document = openapi(DEFAULT_LIMITS)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                schema = answer["content"]["application/json"]["schema"]
                assert (status == "200") != (schema == {"$ref": "#/components/schemas/ErrorAnswer"}), (path, status)
                assert ("Retry-After" in answer.get("headers", {})) == (status in ("429", "503"))


@settings(max_examples=300, deadline=None)
@given(part=PART)
def test_a_part_is_what_the_document_says(part):
    value = {"model": "m", "messages": [{"role": "user", "content": [part]}]}
    event("taken" if taken(ChatBody, value, SMALL) else "refused")
    assert taken(ChatBody, value, SMALL) == allowed(ChatBody, value, SMALL)
