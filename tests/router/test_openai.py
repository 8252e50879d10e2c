"""Requests in, answers out: every wrong body gets one sentence that names the field, and nothing else."""

import json
import math
from array import array
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as sdk_completion
from openai.types.chat import completion_create_params as sdk_chat

from kvferry.common.errors import InvalidRequest, NotFound, Overloaded
from kvferry.router import fields as fields_module
from kvferry.router.answers import Answer, Model, error_body, models_list, usage_of
from kvferry.router.bodies import NEUTRAL_CHAT, NEUTRAL_COMPLETION, ChatBody, CompletionBody
from kvferry.router.choices import Part
from kvferry.router.defaults import SamplingDefaults
from kvferry.router.fields import check_values
from kvferry.router.limits import Limits
from kvferry.router.openai import Conversation, Message, parse_request

TURN, PART = {"role": "user", "content": "a"}, {"type": "text", "text": "a"}
MINIMAL = {
    "completion": {"model": "demo", "prompt": "p"},
    "chat": {"model": "demo", "messages": [{"role": "user", "content": "p"}]},
}
OF_VLLM = (
    "allowed_token_ids", "guided_decoding_backend", "guided_json", "guided_whitespace_pattern", "include_reasoning",
    "kv_transfer_params", "logits_processors", "mm_processor_kwargs", "return_tokens_as_token_ids",
    "structured_outputs", "thinking_token_budget", "truncate_prompt_tokens", "vllm_xargs",
)  # fmt: skip


def parse(kind: str, **fields: Any):
    return parse_request(kind, json.dumps(MINIMAL[kind] | fields).encode())


def refusal(kind: str, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        parse(kind, **fields)
    sentence = str(refused.value)
    assert sentence
    assert "\n" not in sentence
    assert "$" not in sentence
    assert "`" not in sentence
    return refused.value


def test_defaults():
    completion, chat = parse("completion"), parse("chat")
    assert completion.prompts == ("p",)
    assert chat.prompts == (Conversation((Message("user", "p"),)),)
    assert (completion.max_tokens, chat.max_tokens) == (16, None)
    for request in (completion, chat):
        assert (request.temperature, request.top_p, request.top_k, request.seed) == (1.0, 1.0, 0, None)
        assert (request.stop, request.cache_salt, request.stream, request.include_usage) == ((), "", False, False)
        assert (request.min_tokens, request.ignore_eos) == (0, False)
        assert (request.min_p, request.presence_penalty, request.frequency_penalty) == (0.0, 0.0, 0.0)
        assert (request.repetition_penalty, request.logit_bias) == (1.0, ())
        assert (request.bad_words, request.stop_token_ids) == ((), ())
        assert (request.n, request.priority, request.echo) == (1, 0, False)
        assert (request.logprobs, request.prompt_logprobs) == (None, None)


@pytest.mark.parametrize(
    ("field", "sent", "name", "kept"),
    [
        ("max_tokens", 7, "max_tokens", 7),
        ("temperature", 0, "temperature", 0.0),
        ("temperature", 2, "temperature", 2.0),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", 40, "top_k", 40),
        ("top_k", -1, "top_k", 0),
        ("seed", 7, "seed", 7),
        ("seed", -1, "seed", 2**64 - 1),
        ("stop", "a", "stop", ("a",)),
        ("stop", ["a", "b"], "stop", ("a", "b")),
        ("stop", [], "stop", ()),
        ("min_tokens", 3, "min_tokens", 3),
        ("ignore_eos", True, "ignore_eos", True),
        ("cache_salt", "s" * 256, "cache_salt", "s" * 256),
        ("stream", True, "stream", True),
        ("min_p", 0.25, "min_p", 0.25),
        ("presence_penalty", -2, "presence_penalty", -2.0),
        ("frequency_penalty", 1.5, "frequency_penalty", 1.5),
        ("repetition_penalty", 1.1, "repetition_penalty", 1.1),
        ("logit_bias", {"5": 1, "0": -100.0, "50256": 0.5}, "logit_bias", ((5, 1.0), (0, -100.0), (50256, 0.5))),
        ("logit_bias", {str(i): 1 for i in range(1024)}, "logit_bias", tuple((i, 1.0) for i in range(1024))),
        ("bad_words", ["a", " b"], "bad_words", ("a", " b")),
        ("stop_token_ids", [2, 0], "stop_token_ids", (2, 0)),
        ("n", 64, "n", 64),
        ("best_of", 1, "n", 1),
        ("prompt_logprobs", 0, "prompt_logprobs", 0),
        ("prompt_logprobs", 20, "prompt_logprobs", 20),
        ("priority", -(2**31), "priority", -(2**31)),
        ("priority", 2**31 - 1, "priority", 2**31 - 1),
        ("timeout", 0.5, "timeout_s", 0.5),
        ("timeout", 10**6, "timeout_s", 10**6),
        ("include_stop_str_in_output", True, "include_stop", True),
        ("skip_special_tokens", False, "skip_special_tokens", False),
    ],
)
@pytest.mark.parametrize("kind", MINIMAL)
def test_supported_fields_arrive(kind, field, sent, name, kept):
    assert getattr(parse(kind, **{field: sent}), name) == kept
    assert parse(kind, **{field: None}) == parse(kind)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("a", ("a",)),
        (["a"], ("a",)),
        ([1, 2], (array("I", [1, 2]),)),
        ("", ("",)),
        (["a", "", "b"], ("a", "", "b")),
        ([[1], [2, 3]], (array("I", [1]), array("I", [2, 3]))),
        ([[7]], (array("I", [7]),)),
        (["a"] * 128, ("a",) * 128),
    ],
)
def test_prompts(sent, kept):
    assert parse("completion", prompt=sent).prompts == kept


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (["a"] * 129, "a batch of 129; this server takes at most 128"),
        (["a", [1]], "must be a string"),
        ([[1], "a"], "must be a string"),
        ([[1], []], "at least one token id in each list"),
        ([[1], ["a"]], "must be a string"),
        ([[1], [[1]]], "must be a string"),
        ([[1], [-1]], "negative or over 32 bits"),
        ([], "at least one token id"),
        ([1, "a"], "must be a string"),
        ([True], "must be a string"),
        ([1.0], "must be a string"),
        ([-1], "negative or over 32 bits"),
        ([2**32], "negative or over 32 bits"),
        ([10**30], "negative or over 32 bits"),
        (None, "must be a string"),
        ({}, "must be a string"),
    ],
)
def test_refused_prompts(sent, says):
    error = refusal("completion", prompt=sent)
    assert says in str(error)
    assert error.param == "prompt"


@pytest.mark.parametrize("kind", MINIMAL)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("model", 3),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", 2**31),
        ("max_tokens", True),
        ("temperature", 2.01),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("seed", 1.5),
        ("seed", 2**63),
        ("seed", 10**300),
        ("stop", 3),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", ["a" * 257]),
        ("stop", [["a"]]),
        ("min_tokens", -1),
        ("ignore_eos", "yes"),
        ("cache_salt", "s" * 257),
        ("cache_salt", 5),
        ("stream", 1),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "much"),
        ("repetition_penalty", 0),
        ("repetition_penalty", 101),
        ("repetition_penalty", True),
        ("logit_bias", []),
        ("logit_bias", 5),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"5 ": 1}),
        ("logit_bias", {"\u0665": 1}),
        ("logit_bias", {"4294967296": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"5": None}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words", ["  "]),
        ("bad_words", [5]),
        ("bad_words", ["a" * 257]),
        ("bad_words", ["a"] * 129),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**32]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", ["5"]),
        ("stop_token_ids", [1] * 129),
        ("n", 0),
        ("n", -1),
        ("n", 1.5),
        ("n", True),
        ("n", "2"),
        ("best_of", 0),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", True),
        ("priority", 2**31),
        ("priority", -(2**31) - 1),
        ("priority", 0.5),
        ("priority", "high"),
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", "10s"),
        ("skip_special_tokens", 0),
        ("add_special_tokens", "no"),
        ("logprobs", 1.5),
        ("logprobs", "2"),
        ("logprobs", []),
    ],
)
def test_wrong_values_name_their_field(kind, field, value):
    error = refusal(kind, **{field: value})
    assert error.param == field
    assert str(error).startswith(f"{field} must be ")


def test_fields_that_contradict_each_other():
    assert refusal("completion", min_tokens=17).param == "min_tokens"
    assert refusal("chat", top_logprobs=2).param == "top_logprobs"
    assert refusal("chat", top_logprobs=2, logprobs=False).param == "top_logprobs"
    assert refusal("completion", max_tokens=0).param == "max_tokens"
    for kind in MINIMAL:
        assert refusal(kind, best_of=3).param == "best_of"
        assert refusal(kind, best_of=1, n=3).param == "best_of"
        assert parse(kind, best_of=3, n=3).n == 3
        assert refusal(kind, prompt_logprobs=0, stream=True).param == "prompt_logprobs"
    assert refusal("completion", stream_options={"include_usage": True}).param == "stream_options"
    assert refusal("chat", max_tokens=1, max_completion_tokens=2).param == "max_tokens"
    assert parse("chat", max_tokens=2, max_completion_tokens=2).max_tokens == 2
    assert parse("chat", max_completion_tokens=2).max_tokens == 2


@pytest.mark.parametrize("value", [None, False])
def test_no_logprobs(value):
    assert parse("completion", logprobs=value) == parse("completion")
    assert parse("chat", logprobs=value, top_logprobs=0) == parse("chat")


def test_logprobs_of_a_completion():
    assert [parse("completion", logprobs=count).logprobs for count in (0, 5, 20)] == [0, 5, 20]
    for wrong in (-1, 21, True):
        error = refusal("completion", logprobs=wrong)
        assert error.param == "logprobs"
        assert str(error).startswith("logprobs must be a whole number from 0 to 20")
    assert refusal("completion", top_logprobs=2).param == "top_logprobs"


def test_logprobs_of_a_chat():
    assert parse("chat", logprobs=True).logprobs == 0
    assert parse("chat", logprobs=True, top_logprobs=20).logprobs == 20
    assert str(refusal("chat", logprobs=5)).startswith("logprobs must be true or false")
    for wrong in (-1, 21, True):
        assert refusal("chat", logprobs=True, top_logprobs=wrong).param == "top_logprobs"


def test_echo():
    assert parse("completion", echo=True).echo
    assert parse("completion", echo=True, max_tokens=0).max_tokens == 0
    assert refusal("completion", echo="yes").param == "echo"
    assert refusal("completion", echo=True, max_tokens=0, min_tokens=1).param == "min_tokens"
    assert refusal("chat", echo=True).param == "echo"


def test_how_many_answers_a_request_may_want():
    limits = Limits(n=4, prompts=3, choices=8)

    def param(**fields: Any) -> str | None:
        body = json.dumps(MINIMAL["completion"] | fields).encode()
        try:
            parse_request("completion", body, limits)
        except InvalidRequest as error:
            assert "this server" in str(error)  # noqa: PT017
            return error.param
        return None

    assert (param(n=4), param(n=5)) == (None, "n")
    assert (param(prompt=["a"] * 3), param(prompt=["a"] * 4)) == (None, "prompt")
    assert (param(prompt=["a"] * 2, n=4), param(prompt=["a"] * 3, n=3)) == (None, "n")
    assert (refusal("completion", n=65).param, refusal("chat", n=65).param) == ("n", "n")
    assert refusal("completion", prompt=["a"] * 100, n=3).param == "n"


def at(limits: Limits, kind: str = "completion", **fields: Any) -> str | None:
    """The field that is refused under these limits, if one is."""
    try:
        parse_request(kind, json.dumps(MINIMAL[kind] | fields).encode(), limits)
    except InvalidRequest as error:
        return error.param
    return None


def test_how_much_text_a_request_may_have():
    """All prompts together, and all messages; token ids are no text."""
    limits = Limits(prompt_chars=10)
    assert [at(limits, prompt="x" * length) for length in (9, 10, 11)] == [None, None, "prompt"]
    assert [at(limits, prompt=["x" * 5, "x" * length]) for length in (4, 5, 6)] == [None, None, "prompt"]
    assert at(limits, prompt=[65] * 11) is None
    for length, refused in ((4, None), (5, None), (6, "messages")):
        messages = [{"role": "user", "content": "x" * 5}, {"role": "user", "content": "x" * length}]
        assert at(limits, "chat", messages=messages) == refused
        messages = [{"role": "user", "content": "x" * 5, "name": "n" * length}]
        assert at(limits, "chat", messages=messages) == refused
        messages = [{"role": "tool", "content": "x" * 5, "tool_call_id": "n" * length}]
        assert at(limits, "chat", messages=messages) == refused
    for length, refused in ((1, None), (3, None), (4, "messages")):  # {"a":"xxx"} has eleven
        assert at(Limits(prompt_chars=12), "chat", chat_template_kwargs={"a": "x" * length}) == refused


SMALL = Limits(
    stops=3, stop_chars=4, stop_token_ids=3, bad_words=3, bad_word_chars=4, logit_bias=3, logprobs=3, n=3, prompts=3,
    choices=6, prompt_tokens=6, messages=3, parts=4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("field", "bound", "value"),
    [
        ("stop", SMALL.stops, lambda size: ["a"] * size),
        ("stop", SMALL.stop_chars, lambda size: "a" * size),
        ("stop_token_ids", SMALL.stop_token_ids, lambda size: [1] * size),
        ("bad_words", SMALL.bad_words, lambda size: ["a"] * size),
        ("bad_words", SMALL.bad_word_chars, lambda size: ["a" * size]),
        ("logit_bias", SMALL.logit_bias, lambda size: {str(token): 1 for token in range(size)}),
        ("logprobs", SMALL.logprobs, lambda size: size),
        ("prompt_logprobs", SMALL.logprobs, lambda size: size),
        ("n", SMALL.n, lambda size: size),
        ("prompt", SMALL.prompts, lambda size: ["a"] * size),
        ("prompt", SMALL.prompt_tokens, lambda size: [7] * size),
        ("prompt", SMALL.prompt_tokens, lambda size: [[7] * (size - 2), [7, 7]]),
        ("messages", SMALL.messages, lambda size: [TURN] * size),
        ("messages", SMALL.parts, lambda size: [{"role": "user", "content": [PART] * size}]),
        ("messages", SMALL.parts, lambda size: [{"role": "user", "content": [PART] * (size - 2)},
                                                {"role": "user", "content": [PART] * 2}]),
    ],
)  # fmt: skip
def test_each_bound(field, bound, value):
    """At it, one below and one above."""
    kind = "chat" if field == "messages" else "completion"
    told = [at(SMALL, kind, **{field: value(size)}) for size in (bound - 1, bound, bound + 1)]
    assert told == [None, None, field]


def test_how_many_there_are_is_looked_at_first():
    """Of more than there may be none is looked at: the faults of the last are not found."""
    for fields, says in (
        ({"prompt": ["a"] * 3 + [[]]}, "a batch of 4"),
        ({"prompt": [[7]] * 3 + [["x"]]}, "a batch of 4"),
        ({"prompt": [7] * 7 + ["x"]}, "7 tokens"),
        ({"messages": [TURN] * 3 + [{"rôle": 1}]}, "4 messages; this server takes at most 3"),
        ({"messages": [{"role": "user", "content": [PART] * 4 + [{"x": 1}]}]}, "5 text parts in all"),
        ({"stop": ["a"] * 3 + [7]}, "not a list of 4"),
        ({"logit_bias": {"1": 1, "2": 1, "3": 1, "x": 1}}, "it has 4"),
    ):
        kind = "chat" if "messages" in fields else "completion"
        with pytest.raises(InvalidRequest, match=says):
            parse_request(kind, json.dumps(MINIMAL[kind] | fields).encode(), SMALL)


TEXTS = ['a "quoted" [b], {c}', "\\", '\\"', "\\\\,[", "", "\u20ac,,"]


@settings(max_examples=200, deadline=None)
@given(
    value=st.recursive(
        st.integers() | st.sampled_from(TEXTS),
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=6),
        max_leaves=40,
    ),
    scanned=st.integers(1, 50),
)
def test_values_are_counted_as_a_parser_would(value, scanned):
    """Strings with the names of fields, and what holds others; what is inside of a string is no value."""

    def count(one: Any) -> int:
        if isinstance(one, dict):
            return 1 + len(one) + sum(map(count, one.values()))
        return 1 + sum(map(count, one)) if isinstance(one, list) else isinstance(one, str)

    body = json.dumps({"a": value}, ensure_ascii=False).encode()
    found, padded = count({"a": value}), body + b" " * 500
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fields_module, "SCANNED", scanned)
        check_values(padded, Limits(json_values=found))
        if found > 1:
            with pytest.raises(InvalidRequest, match=f"has {found} strings, lists and objects"):
                check_values(padded, Limits(json_values=found - 1))


def test_how_many_numbers_a_body_may_have():
    limits = Limits(json_values=10, prompt_tokens=20)
    for commas, fits in ((29, True), (30, True), (31, False)):
        body = json.dumps([7] * (commas + 1)).encode()
        if fits:
            check_values(body, limits)
        else:
            with pytest.raises(InvalidRequest, match="has 31 commas between values; this server takes 30"):
                check_values(body, limits)


@pytest.mark.parametrize("scanned", [1, 7, 400, 401, 2**18])
@pytest.mark.parametrize("around", [('{"a":', "}"), ('{"a":[1,-', "]}"), ('{"a":"b","c":0.', "e1}")])
def test_how_many_digits_a_number_of_a_large_body_may_have(scanned, around, monkeypatch):
    """Wherever it is cut to be looked at; within a string there may be any number of them."""
    monkeypatch.setattr(fields_module, "SCANNED", scanned)
    limits = Limits(json_values=10)
    begin, end = around
    for digits in (1, 399, 400):
        check_values(f"{begin}{'7' * digits}{end}".encode(), limits)
    check_values(f'{begin}"{"7" * 900}"{end}'.encode(), limits)
    for digits in (401, 402, 900):
        with pytest.raises(InvalidRequest, match="the body has a number of more than 400 digits"):
            check_values(f"{begin}{'7' * digits}{end}".encode(), limits)


def test_as_many_token_ids_as_there_may_be():
    """By the limits as they are, of one prompt or of many."""
    most = Limits().prompt_tokens
    one = b'{"model":"m","prompt":[%s]}' % b",".join([b"7"] * most)
    many = b'{"model":"m","prompt":[%s]}' % b",".join([b"[%s]" % b",".join([b"7"] * (most // 128))] * 128)
    assert [sum(map(len, parse_request("completion", body).prompts)) for body in (one, many)] == [most, most]
    with pytest.raises(InvalidRequest, match="tokens in all"):
        parse_request("completion", one.replace(b"[", b"[7,"))


def test_how_deep_a_body_may_be():
    limits = Limits(json_depth=6)

    def nested(levels: int) -> dict[str, Any]:
        return {"metadata": json.loads("[" * (levels - 1) + "]" * (levels - 1))}

    assert [at(limits, **nested(levels)) for levels in (5, 6)] == [None, None]
    for kind in MINIMAL:
        with pytest.raises(InvalidRequest, match="nested too deeply; this server takes 6 levels"):
            parse_request(kind, json.dumps(MINIMAL[kind] | nested(7)).encode(), limits)
    many = json.dumps(MINIMAL["completion"] | {"prompt": [[7]] * 100, "metadata": {"a": [{}] * 50}}).encode()
    assert len(parse_request("completion", many, limits).prompts) == 100, "wide is not deep"


def test_what_the_models_makers_advise():
    """It counts where the client says nothing."""
    advised = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, min_p=0.1, repetition_penalty=1.05)
    for kind, body in MINIMAL.items():
        asked = parse_request(kind, json.dumps(body).encode()).advised(advised)
        assert (asked.temperature, asked.top_p, asked.top_k) == (0.7, 0.8, 20)
        assert (asked.min_p, asked.repetition_penalty) == (0.1, 1.05)
        own = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        asked = parse_request(kind, json.dumps(body | own).encode()).advised(advised)
        plain = parse_request(kind, json.dumps(body | {"temperature": 0}).encode())
        assert asked == plain.advised(SamplingDefaults())


def test_fields_of_the_chat_template():
    asked = parse("chat", chat_template_kwargs={"enable_thinking": False}).prompts[0]
    assert asked.template_fields == {"enable_thinking": False}
    assert (asked.generation_prompt, asked.continues) == (True, False)
    asked = parse("chat", add_generation_prompt=False, continue_final_message=True).prompts[0]
    assert (asked.generation_prompt, asked.continues) == (False, True)
    assert refusal("chat", continue_final_message=True).param == "continue_final_message"
    assert refusal("chat", chat_template_kwargs=[]).param == "chat_template_kwargs"


def test_special_tokens():
    assert (parse("completion").special_tokens, parse("chat").special_tokens) == (True, False)
    assert not parse("completion", add_special_tokens=False).special_tokens
    assert parse("chat", add_special_tokens=True).special_tokens


def test_stream_options():
    assert parse("chat", stream=True, stream_options={"include_usage": True}).include_usage
    assert not parse("chat", stream=True, stream_options={}).include_usage
    assert refusal("chat", stream=True, stream_options={"include_usage": 1}).param == "stream_options.include_usage"
    error = refusal("chat", stream=True, stream_options={"include_usag": True})
    assert error.param == "stream_options.include_usag"
    assert "did you mean include_usage?" in str(error)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (3, "messages[1]"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "robot", "content": "x"}, "messages[1].role"),
        ({"role": ["user"], "content": "x"}, "messages[1].role"),
        ({"role": "function", "content": None}, "messages[1].content"),
        ({"role": "tool", "content": None}, "messages[1].content"),
        ({"role": "user", "content": "x", "name": 3}, "messages[1].name"),
        ({"role": "user", "content": "x", "tool_call_id": "c1"}, "messages[1].tool_call_id"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[1].tool_calls"),
        ({"role": "user", "content": "x", "contents": "x"}, "messages[1].contents"),
        ({"role": "user", "content": [3]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "refusal", "text": "x"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "refusal"}]}, "messages[1].content[0].refusal"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": 1}]}, "messages[1].content[0].refusal"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "z": 1}]}, "messages[1].content[0].z"),
    ],
)
def test_wrong_messages_name_their_place(message, param):
    assert refusal("chat", messages=[{"role": "user", "content": "x"}, message]).param == param


def test_messages():
    cached = {"cache_control": {"type": "ephemeral"}, "refusal": None}
    parts = [{"type": "text", "text": "a", **cached}, {"type": "text", "text": "b"}]
    refused = [{"type": "text", "text": "s"}, {"type": "refusal", "refusal": "no"}]
    sent = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "r", "refusal": None, "tool_calls": []},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "user", "content": "u", "name": "bob"},
        {"role": "tool", "content": "t", "tool_call_id": "c1"},
        {"role": "function", "content": "f", "name": "g"},
        {"role": "assistant", "content": refused, "reasoning": None, "reasoning_content": None},
    ]
    expected = (
        Message("developer", "d"), Message("user", "a\nb"), Message("assistant", "r"), Message("assistant", ""),
        Message("assistant", ""), Message("user", "u", name="bob"), Message("tool", "t", tool_call_id="c1"),
        Message("function", "f", name="g"), Message("assistant", "s\nno"),
    )  # fmt: skip
    assert parse("chat", messages=sent).prompts == (Conversation(expected),)
    assert refusal("chat", messages=[]).param == "messages"
    assert refusal("chat", messages="x").param == "messages"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(kind, name, value)
     for kind, table in (("completion", NEUTRAL_COMPLETION), ("chat", NEUTRAL_CHAT))
     for name, values in table.items()
     for value in (None, *(v for v in values if isinstance(v, str | int | list | dict)))],
)  # fmt: skip
def test_neutral_values_change_nothing(kind, name, value):
    assert parse(kind, **{name: value}) == parse(kind)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("completion", sdk_completion.CompletionCreateParamsBase.__annotations__),
        ("chat", sdk_chat.CompletionCreateParamsBase.__annotations__),
        ("chat", OF_VLLM),
        ("completion", (*OF_VLLM, "prompt_embeds")),
    ],
    ids=["completion", "chat", "vllm chat", "vllm completion"],
)
def test_whatever_the_apis_have_may_be_null(kind, names):
    assert parse(kind, **{name: None for name in names if name not in MINIMAL[kind]}) == parse(kind)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("completion", "best_of", 3),
        ("completion", "suffix", "x"),
        ("completion", "length_penalty", 0.5),
        ("completion", "allowed_token_ids", [1]),
        ("chat", "echo", True),
        ("chat", "tools", [{"type": "function"}]),
        ("chat", "tool_choice", "required"),
        ("chat", "response_format", {"type": "json_object"}),
        ("chat", "store", True),
        ("chat", "modalities", ["audio"]),
        ("chat", "reasoning_effort", "high"),
        ("chat", "chat_template", "{{ messages }}"),
        ("chat", "prediction", {"type": "content", "content": "x"}),
        ("chat", "service_tier", "flex"),
        ("completion", "response_format", {"type": "json_object"}),
        ("completion", "return_tokens_as_token_ids", True),
        ("completion", "prompt_embeds", "AAAA"),
        ("chat", "logits_processors", ["x"]),
        ("chat", "vllm_xargs", {"x": 1}),
    ],
)
def test_what_would_change_the_answer_is_refused(kind, name, value):
    error = refusal(kind, **{name: value})
    assert error.param == name
    assert str(error).startswith(f"{name} is not supported yet; leave it out")


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("chat", {"verbosity": "low"}, 'is not supported yet; leave it out or send "medium", not "low"'),
        ("chat", {"service_tier": "flex"}, 'is not supported yet; leave it out or send "auto", not "flex"'),
        ("completion", {"truncation_side": "up"}, 'leave it out or send "left", not "up"'),
        ("chat", {"tool_choice": "required"}, 'leave it out or send "none", not "required"; tools are not supported: '),
        ("chat", {"response_format": {"type": "json_object"}}, '{"type":"text"}, not one of type "json_object"; say'),
        ("chat", {"messages": [{"role": "robot", "content": "x"}]},
         'messages[0].role must be one of system, developer, user, assistant, tool, function, not "robot"'),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         'must be text or refusal, the only parts supported yet, not "image_url"'),
        ("chat", {"messages": [{"role": 3, "content": "x"}]}, "tool, function, not 3"),
    ],
)  # fmt: skip
def test_the_word_that_was_sent_where_one_of_a_few_is_expected_is_told(kind, fields, says):
    assert says in str(refusal(kind, **fields))


@pytest.mark.parametrize("text", ["a secret of two words", "s" * 33, "{}", ""])
def test_what_could_be_no_such_word_is_not_repeated(text):
    for fields in (
        {"service_tier": text},
        {"response_format": {"type": text}},
        {"messages": [{"role": text, "content": "x"}]},
    ):
        told = str(refusal("chat", **fields))
        assert f"a string of {len(text)} character" in told
        assert not text or text not in told.replace('{"type":"text"}', "")
    assert "chatty" not in str(refusal("chat", temperature="chatty")), "it is no word that is expected there"


def test_tools_are_refused_with_what_to_do():
    advice = "tools are not supported: describe them in a message, and read the call from the answer's text"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert str(refusal("chat", tools=tools)) == f"tools is not supported yet; leave it out or send []; {advice}"
    assert str(refusal("completion", tools=tools)) == f"'tools' is not a field of this request; {advice}"
    assert refusal("completion", tools=tools).param == "tools"


def test_a_field_of_the_other_route_is_told_so():
    assert (
        str(refusal("completion", messages=[]))
        == "'messages' is not a field of this request; /v1/chat/completions has it"
    )
    assert str(refusal("chat", prompt="x")) == "'prompt' is not a field of this request; /v1/completions has it"


def test_unknown_fields_are_refused_with_the_nearest():
    assert refusal("completion", temprature=None).param == "temprature"
    error = refusal("completion", temprature=1)
    assert error.param == "temprature"
    assert "did you mean temperature?" in str(error)
    for odd in ("zzzzzz", "stop_words", "model_name", "max_length", "best", "prompts_file", "logit"):
        assert "did you mean" not in str(refusal("completion", **{odd: 1})), odd
    for near, meant in {
        "maxTokens": "max_tokens",
        "top-p": "top_p",
        "topP": "top_p",
        "seeds": "seed",
        "setop": "stop",
    }.items():
        assert f"did you mean {meant}?" in str(refusal("completion", **{near: 1}))
    assert len(str(refusal("completion", **{"y" * 10_000: 1}))) < 200
    assert refusal("completion", messages=[]).param == "messages"
    assert refusal("chat", prompt="x").param == "prompt"


@pytest.mark.parametrize("kind", MINIMAL)
def test_missing_fields(kind):
    """Only what is asked has to be there; of models there may be only one."""
    (name,) = MINIMAL[kind].keys() - {"model"}
    with pytest.raises(InvalidRequest, match=f"^{name} is missing; it must be ") as refused:
        parse_request(kind, b'{"model": "demo"}')
    assert refused.value.param == name
    for more in ({}, {"model": None}):
        assert parse_request(kind, json.dumps({name: MINIMAL[kind][name], **more}).encode()).model is None


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "the body is empty"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object, not a list"),
        (b'"x"', "must be a JSON object, not a string"),
        (b'{"model":"m","prompt":"x","temperature":NaN}', "not valid JSON"),
        (b'{"model":"m","prompt":"x","temperature":-Infinity}', "not valid JSON"),
        (b'{"model":"m","prompt":"x","temperature":1e999}', "not valid JSON: number out of range"),
        (b'{"model":"m","prompt":"\\ud800"}', "not valid JSON"),
        (b'{"model":"m","prompt":"\xff"}', "not UTF-8"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"a":' * 30_000, "nested too deeply"),
    ],
)
def test_bodies_that_are_no_request(body, says):
    with pytest.raises(InvalidRequest, match=says):
        parse_request("completion", body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__, *NEUTRAL_CHAT, *NEUTRAL_COMPLETION})
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "x"]), JSON | st.sampled_from(["user", "tool"])),
    max_size=3,
)


@settings(max_examples=1500, deadline=None)
@given(
    kind=st.sampled_from(sorted(MINIMAL)),
    fields=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), JSON | MESSAGES, max_size=4),
    whole=st.booleans(),
)
@example(kind="chat", fields={"messages": [{"role": {}, "content": []}]}, whole=True)
def test_any_object_is_a_request_or_a_refusal(kind, fields, whole):
    body = (MINIMAL[kind] if whole else {}) | fields
    try:
        request = parse_request(kind, json.dumps(body).encode())
    except InvalidRequest as error:
        event("refused")
        assert json.loads(error_body(error))["error"]["message"] == str(error)  # noqa: PT017
    else:
        event("accepted")
        assert 0 <= request.temperature <= 2
        assert request.seed is None or 0 <= request.seed < 2**64
        assert all(request.stop)
        assert all(abs(bias) <= 100 for _, bias in request.logit_bias)
        assert all(0 <= token < 2**32 for token in request.stop_token_ids)
        assert 1 <= request.n * len(request.prompts) <= 256
        assert request.logprobs is None or 0 <= request.logprobs <= 20


@settings(max_examples=500, deadline=None)
@given(body=st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789.eE+-\\untrfals', max_size=40).map(str.encode))
def test_any_bytes_are_a_request_or_a_refusal(body):
    with pytest.raises(InvalidRequest):
        parse_request("completion", body)


def test_nothing_of_the_client_is_in_the_repr():
    written = {"prompt": "secret-1", "stop": "secret-2", "cache_salt": "secret-3", "bad_words": ["secret-4"]}
    request = parse("completion", **written)
    assert "secret" not in repr(request)
    told = parse("chat", messages=[{"role": "user", "content": "secret-1"}], chat_template_kwargs={"a": "secret-2"})
    assert "secret" not in repr(told)


def test_completion_answer():
    answer = Answer("completion", "demo", "r1", 123)
    usage = usage_of(5, 2, 3, {"reused": {"gpu": 3}})
    assert json.loads(answer.whole([Part(0, "hi", (7,), "stop")], usage)) == {
        "id": "cmpl-r1",
        "object": "text_completion",
        "created": 123,
        "model": "demo",
        "choices": [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 3},
            "kvferry": {"reused": {"gpu": 3}},
        },
    }
    assert "kvferry" not in json.loads(answer.whole([Part(0, "hi", (7,), "stop")], usage_of(1, 1, 0)))["usage"]
    told = [json.loads(chunk)["choices"] for chunk in answer.chunks(Part(0, "hi", (7,), "stop"))]
    assert [[(one["text"], one["finish_reason"]) for one in choices] for choices in told] == [
        [("hi", None)],
        [("", "stop")],
    ]


def test_chat_answer_and_stream():
    answer = Answer("chat", "demo", "r1", 123, include_usage=True)
    whole = json.loads(answer.whole([Part(0, "hi", (7,), "length")], usage_of(5, 2, 0)))
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "hi", "refusal": None}
    chunks = [*answer.chunks(Part(0, "a", (7,), "stop")), answer.usage_chunk(usage_of(5, 2, 0))]
    role, text, last, usage = map(json.loads, chunks)
    assert {chunk["id"] for chunk in (role, text, last, usage)} == {"chatcmpl-r1"}
    assert {chunk["object"] for chunk in (role, text, last, usage)} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in (role, text, last)] == [
        {"role": "assistant", "content": ""}, {"content": "a"}, {}]  # fmt: skip
    assert [chunk["choices"][0]["finish_reason"] for chunk in (role, text, last)] == [None, None, "stop"]
    assert [chunk["usage"] for chunk in (role, text, last)] == [None] * 3
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 7
    assert "usage" not in json.loads(Answer("chat", "demo", "r1", 123).chunks(Part(0, "a", (7,)))[-1])


def test_why_a_choice_stopped():
    said = [Part(0, "hi", (7,), "stop", stop_reason="END"), Part(1, "ho", (8,), "stop", stop_reason=8)]
    for kind in MINIMAL:
        choices = json.loads(Answer(kind, "demo", "r1", 123, n=2).whole(said, usage_of(1, 1, 0)))["choices"]
        assert [(one["finish_reason"], one["stop_reason"]) for one in choices] == [("stop", "END"), ("stop", 8)]
        chunks = [json.loads(chunk)["choices"][0] for chunk in Answer(kind, "demo", "r1", 123).chunks(said[0])]
        assert [one["stop_reason"] for one in chunks] == [None] * (len(chunks) - 1) + ["END"]


def test_token_ids_where_vllm_has_them():
    assert parse("completion").return_token_ids is False
    assert parse("completion", return_token_ids=True).return_token_ids is True
    usage = usage_of(2, 1, 0)
    said = [Part(0, "hi", (7,), "stop"), Part(1, "ho", (8,), "stop")]

    def answer(kind: str) -> Answer:
        return Answer(kind, "demo", "r1", 123, prompt_token_ids=[[5, 6]], n=2)

    choices = json.loads(answer("completion").whole(said, usage))["choices"]
    assert [(one["prompt_token_ids"], one["token_ids"]) for one in choices] == [([5, 6], [7]), ([5, 6], [8])]
    opening, new, last = (json.loads(c)["choices"][0] for c in answer("completion").chunks(said[1]))
    assert (opening["prompt_token_ids"], opening["token_ids"], opening["text"]) == ([5, 6], [], "")
    assert (new["token_ids"], last["token_ids"]) == ([8], [])
    chat = json.loads(answer("chat").whole(said, usage))
    assert (chat["prompt_token_ids"], [one["token_ids"] for one in chat["choices"]]) == ([5, 6], [[7], [8]])
    streamed = answer("chat")
    opening, new, last = (json.loads(chunk) for chunk in streamed.chunks(said[0]))
    assert opening["prompt_token_ids"] == [5, 6]
    assert [one["choices"][0]["token_ids"] for one in (opening, new, last)] == [[], [7], []]
    assert "prompt_token_ids" not in json.loads(streamed.chunks(said[1])[0])
    for kind in MINIMAL:
        streamed = answer(kind)
        streamed.chunks(said[0])
        (new,) = streamed.chunks(Part(0, "", (9,)))
        assert json.loads(new)["choices"][0]["token_ids"] == [9], "its text is held back, its id is not"
    assert Answer("completion", "demo", "r1", 123).chunks(Part(0, "", (7,))) == []


def test_error_bodies():
    body = json.loads(error_body(InvalidRequest("n is wrong", "n")))
    assert body == {
        "error": {"message": "n is wrong", "type": "invalid_request_error", "param": "n", "code": "invalid_request"}
    }
    assert json.loads(error_body(NotFound("no")))["error"]["param"] is None
    assert json.loads(error_body(Overloaded("full")))["error"]["code"] == "overloaded"
    bug = json.loads(error_body(ZeroDivisionError("secret detail")))["error"]
    assert "secret" not in bug["message"]
    assert bug["type"] == "server_error"


def test_models_list():
    body = json.loads(models_list([Model(id="demo", created=5, max_model_len=64)]))
    assert body["object"] == "list"
    assert body["data"] == [{"id": "demo", "object": "model", "created": 5, "owned_by": "kvferry", "max_model_len": 64}]
    assert math.isfinite(body["data"][0]["max_model_len"])
