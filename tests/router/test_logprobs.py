"""What is told of tokens, as OpenAI's and vLLM's clients read it."""

import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from kvferry.cli.demo_model import byte_tokenizer
from kvferry.common.sampling import TokenLogprobs
from kvferry.router.answers import Answer, usage_of
from kvferry.router.choices import Choice, Part, joined
from kvferry.router.handover import Piece
from kvferry.router.logprobs import Offsets, Told, chat_logprobs, completion_logprobs, prompt_logprobs
from kvferry.router.openai import GenerationRequest
from kvferry.router.text import Tokenizer

BYTES = Tokenizer(byte_tokenizer())
EURO = "\u20ac".encode()
NONE = float("-inf")


def told_of(token_ids, start=0) -> tuple[Told, ...]:
    """Each token with two likelier ones, 65 and itself."""
    logprobs = [TokenLogprobs(-1.5, 1, ((65, -0.25), (token, -1.5), (66, -3.0))) for token in token_ids]
    return Offsets(BYTES, start).tell(token_ids, logprobs)


def plain(shape: Any) -> Any:
    """As a client reads it."""
    return json.loads(msgspec.json.encode(shape))


def test_a_completion_has_openais_lists():
    told = told_of([0x61, *EURO, 257], start=4)
    shape = completion_logprobs(told, 2, BYTES)
    assert shape["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "<|eos|>"]
    assert shape["token_logprobs"] == [-1.5] * 5
    assert shape["text_offset"] == [4, 5, 5, 5, 6]
    assert shape["top_logprobs"][1] == {"A": -0.25, "bytes:\\xe2": -1.5}
    assert completion_logprobs(told, 1, BYTES)["top_logprobs"][0] == {"A": -0.25, "a": -1.5}, "the token itself too"
    assert completion_logprobs(told, 0, BYTES)["top_logprobs"][0] == {"a": -1.5}
    first = completion_logprobs(Offsets(BYTES).tell([256, 0x61], [None, told[0].logprobs]), 1, BYTES)
    assert first["token_logprobs"] == [None, -1.5]
    assert first["top_logprobs"][0] is None


def test_a_chat_has_openais_entries():
    shape = plain(chat_logprobs(told_of([EURO[0]]), 2, BYTES))
    assert shape["refusal"] is None
    assert shape["content"] == [
        {
            "token": "\\xe2",
            "logprob": -1.5,
            "bytes": [0xE2],
            "top_logprobs": [
                {"token": "A", "logprob": -0.25, "bytes": [0x41]},
                {"token": "\\xe2", "logprob": -1.5, "bytes": [0xE2]},
            ],
        }
    ]
    assert plain(chat_logprobs(told_of([900]), 0, BYTES))["content"][0] == {
        "token": "token_id:900", "logprob": -1.5, "bytes": None, "top_logprobs": []}  # fmt: skip


def test_vllms_ranks_count_from_one():
    """The prompt's own token comes first, also where it is not among the likeliest."""
    told = [TokenLogprobs(-4.0, 7, ((65, -0.25), (66, -0.5))), TokenLogprobs(-0.25, 0, ((65, -0.25), (66, -0.5)))]
    first, second, third = plain(prompt_logprobs([256, 0x61, 65], told, 2, BYTES))
    assert first is None
    assert list(second) == ["97", "65", "66"]
    assert second["97"] == {"logprob": -4.0, "rank": 8, "decoded_token": "a"}
    assert second["65"] == {"logprob": -0.25, "rank": 1, "decoded_token": "A"}
    assert list(third) == ["65", "66"]
    assert list(plain(prompt_logprobs([256, 0x61, 65], told, 1, BYTES))[2]) == ["65"]
    assert prompt_logprobs([256], [], 5, BYTES) == [None]


def test_what_is_impossible_is_still_json():
    told = [Told(0x61, TokenLogprobs(NONE, 263, ((65, NONE),)), 0)]
    for shape in (completion_logprobs(told, 1, BYTES), chat_logprobs(told, 1, BYTES)):
        assert "-9999.0" in json.dumps(plain(shape), allow_nan=False)
    assert plain(prompt_logprobs([1, 97], [told[0].logprobs], 1, BYTES))[1]["97"]["logprob"] == -9999.0


def asked(**fields) -> GenerationRequest:
    return GenerationRequest(**({"kind": "chat", "model": "m", "prompts": ("p",), "max_tokens": 99} | fields))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_tokens_ids_and_logprobs_travel_together(data):
    """Whatever is held back of the text, for a stop string or a character: all arrive, once and in order."""
    text = data.draw(st.text("ab\u20ac\U0001f600", min_size=1, max_size=20))
    stops = tuple(data.draw(st.lists(st.text("ab\u20ac", min_size=1, max_size=3), max_size=2)))
    token_ids = list(text.encode())
    choice = Choice(0, BYTES, asked(logprobs=1, stop=stops), 0)
    parts = []
    for number, token in enumerate(token_ids):
        told = TokenLogprobs(-float(number), 0)
        parts.append(choice.take(Piece((token,), "length" if number == len(token_ids) - 1 else None, 0, (told,))))
        if parts[-1].finish_reason:
            break
    (whole,) = joined(parts, 1)
    assert list(whole.token_ids) == [one.token_id for one in whole.told] == token_ids[: len(parts)]
    assert [-one.logprobs.logprob for one in whole.told] == list(range(len(parts)))
    if whole.finish_reason == "length":
        assert whole.text == text
    else:
        assert not any(stop in whole.text for stop in stops)
        assert text.startswith(whole.text)


def answer(kind: str, top: int = 2) -> Answer:
    of_kind = completion_logprobs if kind == "completion" else chat_logprobs
    return Answer(kind, "demo", "r1", 123, False, lambda told: of_kind(told, top, BYTES), n=2)


SAID = [Part(0, "a", (0x61,), "stop", told_of([0x61])), Part(1, "b", (0x62,), "length", told_of([0x62]))]


def test_openais_own_types_read_a_completion():
    body = answer("completion").whole(SAID, usage_of(1, 2, 0))
    read = Completion.model_validate(json.loads(body), strict=True)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in read.choices] == [
        (0, "a", "stop"), (1, "b", "length")]  # fmt: skip
    assert read.choices[1].logprobs.tokens == ["b"]
    assert read.choices[1].logprobs.top_logprobs == [{"A": -0.25, "b": -1.5}]
    streamed = answer("completion")
    chunks = [json.loads(chunk)["choices"][0] for part in SAID for chunk in streamed.chunks(part)]
    assert [(chunk["index"], chunk["text"], chunk["finish_reason"]) for chunk in chunks] == [
        (0, "a", None), (0, "", "stop"), (1, "b", None), (1, "", "length")]  # fmt: skip
    assert [chunk["logprobs"] and chunk["logprobs"]["tokens"] for chunk in chunks] == [["a"], None, ["b"], None]


def test_openais_own_types_read_a_chat():
    read = ChatCompletion.model_validate(json.loads(answer("chat").whole(SAID, usage_of(1, 2, 0))), strict=True)
    assert [choice.message.content for choice in read.choices] == ["a", "b"]
    assert [choice.logprobs.content[0].bytes for choice in read.choices] == [[0x61], [0x62]]
    assert [top.token for top in read.choices[0].logprobs.content[0].top_logprobs] == ["A", "a"]
    streamed = answer("chat")
    chunks = [
        ChatCompletionChunk.model_validate(json.loads(chunk), strict=True).choices[0]
        for part in SAID
        for chunk in streamed.chunks(part)
    ]
    assert [(chunk.index, chunk.delta.role, chunk.delta.content, chunk.finish_reason) for chunk in chunks] == [
        (0, "assistant", "", None), (0, None, "a", None), (0, None, None, "stop"),
        (1, "assistant", "", None), (1, None, "b", None), (1, None, None, "length"),
    ]  # fmt: skip
    assert [chunk.logprobs and chunk.logprobs.content[0].token for chunk in chunks] == [
        None, "a", None, None, "b", None]  # fmt: skip


def test_what_is_told_of_prompts_stands_where_vllm_has_it():
    told = [[None, {"97": {"logprob": -1.0, "rank": 1, "decoded_token": "a"}}]]
    body = json.loads(answer("completion").whole(SAID, usage_of(1, 2, 0), told))
    assert [choice["prompt_logprobs"] for choice in body["choices"]] == [told[0], told[0]]
    assert json.loads(answer("chat").whole(SAID, usage_of(1, 2, 0), told))["prompt_logprobs"] == told[0]
    assert "prompt_logprobs" not in json.loads(answer("chat").whole(SAID, usage_of(1, 2, 0)))
    two_prompts = Answer("completion", "demo", "r1", 123, n=1).whole(SAID, usage_of(1, 2, 0), [[None], told[0]])
    assert [len(choice["prompt_logprobs"]) for choice in json.loads(two_prompts)["choices"]] == [1, 2]
