"""Detokenising and stop strings: whatever the chunks, the pieces add up to the whole. Tokens by themselves."""

import asyncio
import json
import threading
from array import array
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from kvferry.cli.demo_model import byte_tokenizer
from kvferry.common.errors import ConfigError, InvalidRequest
from kvferry.router.choices import Choice
from kvferry.router.detokenize import MAX_WINDOW, StopScanner
from kvferry.router.handover import Piece
from kvferry.router.limits import DEFAULT_LIMITS, Limits
from kvferry.router.logprobs import Offsets, Told
from kvferry.router.openai import Conversation, Message, Prompt, parse_request
from kvferry.router.text import INLINE_CHARS, SHORT_CHARS, TURN_CHARS, Tokenizer, check_token_ids, load_tokenizer


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words with a leading space mark, bytes for what is not in the vocabulary."""
    words = ["\u2581", *"abcdeh \u00e9\u2581", "\u2581a", "he", "\u2581he"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for word in words:
        vocab.setdefault(word, len(vocab))
    merges = [("\u2581", "a"), ("h", "e"), ("\u2581", "he")]
    tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BYTES = Tokenizer(byte_tokenizer())
FALLBACK = Tokenizer(byte_fallback_tokenizer())
KINDS = {"byte-level": BYTES, "byte fallback": FALLBACK}


def pieces(draw, items):
    """Cut a list into chunks at random, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(items)), max_size=len(items) + 1)))
    return [items[start:end] for start, end in zip([0, *cuts], [*cuts, len(items)], strict=True)]


def run(detokenizer, chunks) -> str:
    text = "".join(detokenizer.push(chunk)[0] for chunk in chunks)
    return text + detokenizer.finish()


def stopped_text(text: str, stops: list[str], quiet: int = 0, included: bool = False) -> str:
    """The reference: read on until a stop string is complete, after `quiet` characters, then cut before or after it."""
    for end in range(quiet + 1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - (0 if included else max(map(len, complete)))]
    return text


@pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_add_up_to_the_text(tokenizer, data):
    text = data.draw(
        st.text(st.one_of(st.sampled_from("abc he\u00e9\u20ac\U0001f600\ufffd\u2581"), st.characters(codec="utf-8")))
    )
    token_ids = tokenizer.encode_now(text)
    whole = tokenizer.decode(token_ids)
    assert run(tokenizer.detokenizer(), pieces(data.draw, token_ids)) == whole
    assert run(tokenizer.detokenizer(), [[token] for token in token_ids]) == whole
    if tokenizer is BYTES and "<|" not in text:  # the text of a special token is that token
        assert whole == text


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_byte_level_pieces_add_up_for_any_bytes(data):
    byte = st.one_of(
        st.sampled_from([0x41, 0x82, 0xAC, 0xC3, 0xE2, 0xED, 0xF0, 0x9F, 0xFF, 256, 257, 900]), st.integers(0, 263)
    )
    token_ids = data.draw(st.lists(byte, max_size=80))
    assert run(BYTES.detokenizer(), pieces(data.draw, token_ids)) == BYTES.decode(token_ids)
    assert BYTES.decode(token_ids) == bytes(token for token in token_ids if token < 256).decode(errors="replace")


@pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)
@settings(max_examples=200, deadline=None)
@given(token_ids=st.lists(st.integers(0, 255), max_size=200))
def test_work_per_token_is_bounded(tokenizer, token_ids):
    detokenizer = tokenizer.detokenizer()
    for token in token_ids:
        detokenizer.push([token])
        assert len(detokenizer._window) <= 2 * MAX_WINDOW


def test_unfinished_character_is_held_and_flushed():
    detokenizer = BYTES.detokenizer()
    euro = "\u20ac".encode()
    assert detokenizer.push([0x41, euro[0]]) == ("A", False)
    assert detokenizer.push([euro[1]]) == ("", False)
    assert detokenizer.push([euro[2]]) == ("\u20ac", False)
    assert detokenizer.push([euro[0]]) == ("", False)
    assert detokenizer.finish() == "\ufffd"


def test_text_is_sent_as_soon_as_it_is_certain():
    detokenizer = BYTES.detokenizer(["END"])
    sent = [detokenizer.push([byte])[0] for byte in b"a EN b END c"]
    assert sent == ["a", " ", "", "", "EN ", "b", " ", "", "", "", "", ""]
    assert detokenizer.stopped
    assert detokenizer.finish() == ""


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_stop_strings_cut_as_the_reference(data):
    letters = st.text("ab\u00e9", min_size=1, max_size=4)
    stops = data.draw(st.lists(letters, max_size=4))
    text = data.draw(st.text("ab\u00e9c", max_size=30))
    scanner = StopScanner(stops)
    sent = ""
    for chunk in pieces(data.draw, text):
        sent += scanner.push(chunk)
        if scanner.found is not None:
            break
    sent += scanner.finish() if scanner.found is None else ""
    assert sent == stopped_text(text, stops)
    assert (scanner.found is not None) == any(stop in text for stop in stops)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), included=st.booleans())
def test_no_stop_string_ends_the_first_tokens(data, included):
    """What `min_tokens` promises. A stop string may begin in them."""
    stops = data.draw(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
    text, quiet = data.draw(st.text("abc", max_size=20)), data.draw(st.integers(0, 22))
    asked = parse_request("completion", json.dumps({"model": "m", "prompt": "p", "stop": stops, "max_tokens": 99,
                          "min_tokens": quiet, "include_stop_str_in_output": included}).encode())  # fmt: skip
    choice, said = Choice(0, BYTES, asked, 0), ""
    chunks = pieces(data.draw, tuple(text.encode()))
    for number, chunk in enumerate(chunks):
        part = choice.take(Piece(chunk, "length" if number == len(chunks) - 1 else None))
        said += part.text
        if part.finish_reason:
            break
    assert said == stopped_text(text, stops, quiet, included)
    ended = stopped_text(text, stops, quiet) != text
    assert (part.stop_reason in stops) == (part.finish_reason == "stop")
    assert part.finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize(
    ("fields", "last", "text", "reason"),
    [
        ({}, 257, "ab", None),
        ({"skip_special_tokens": False}, 257, "ab", None),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, 257, "ab<|eos|>", None),
        ({"stop_token_ids": [99]}, 99, "ab", 99),
        ({"stop_token_ids": [99], "include_stop_str_in_output": True}, 99, "abc", 99),
    ],
)
def test_the_token_that_ends_an_answer(fields, last, text, reason):
    """It is no part of the text unless that is asked for."""
    asked = parse_request("completion", json.dumps({"model": "m", "prompt": "p", **fields}).encode())
    choice = Choice(0, BYTES, asked, 0)
    parts = [choice.take(Piece((97, 98))), choice.take(Piece((last,), "stop"))]
    assert "".join(part.text for part in parts) == text
    assert (parts[-1].stop_reason, parts[-1].token_ids) == (reason, (last,))


def test_special_tokens_are_shown_where_that_is_asked_for():
    detokenizer = BYTES.detokenizer(skip_special_tokens=False)
    assert run(detokenizer, [[256, 0x61, 260], [257, 0x62, 299]]) == "<|bos|>a<|user|><|eos|>b"
    assert BYTES.decode_all([256, 0x61, 299]) == "<|bos|>a"
    assert BYTES.names([256, 0x61, 0x20]) == ["<|bos|>", "a", "\u0120"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stop_strings_through_tokens(data):
    stops = data.draw(st.lists(st.text("a\u20acb", min_size=1, max_size=3), min_size=1, max_size=3))
    text = data.draw(st.text("a\u20acbc", max_size=20))
    detokenizer = BYTES.detokenizer(stops)
    sent = run(detokenizer, pieces(data.draw, list(text.encode())))
    assert sent == stopped_text(text, stops)
    assert detokenizer.stopped == any(stop in text for stop in stops)


def test_special_tokens_are_not_shown():
    assert run(BYTES.detokenizer(), [[256, 0x61, 260], [257, 0x62, 299]]) == "ab"


def test_tokens_that_are_no_whole_character():
    euro = "\u20ac".encode()
    assert [BYTES.token(byte).data for byte in euro] == [euro[:1], euro[1:2], euro[2:]]
    assert BYTES.token(0xE2).name == "\\xe2"
    assert (BYTES.token(0x41).name, BYTES.token(0x41).data) == ("A", b"A")
    assert (BYTES.token(0x20).name, BYTES.token(0x0A).name) == (" ", "\n")
    byte = FALLBACK._tokenizer.convert_tokens_to_ids("<0xE2>")
    assert (FALLBACK.token(byte).name, FALLBACK.token(byte).data) == ("\\xe2", b"\xe2")


def test_a_space_that_a_token_begins_with_is_part_of_it():
    ids = FALLBACK._tokenizer.convert_tokens_to_ids
    assert FALLBACK.token(ids("\u2581he")).data == b" he"
    assert FALLBACK.token(ids("he")).data == b"he"
    assert FALLBACK.leading_space(ids("\u2581he"))
    assert not FALLBACK.leading_space(ids("he"))
    assert not BYTES.leading_space(0x20), "this decoder takes nothing away"


def test_special_and_unknown_tokens_have_names():
    assert (BYTES.token(257).name, BYTES.token(257).shown) == ("<|eos|>", False)
    assert BYTES.token(257).data == b"<|eos|>"
    unknown = BYTES.token(900)
    assert (unknown.name, unknown.data, unknown.shown) == ("token_id:900", None, False)


@pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("abc he\u00e9\u20ac\U0001f600")))
def test_offsets_are_where_the_tokens_are_in_the_text(tokenizer, text):
    token_ids = tokenizer.encode_now(text)
    whole, told = tokenizer.decode(token_ids), Offsets(tokenizer).tell(token_ids, [None] * len(token_ids))
    shown = [one for one in told if tokenizer.token(one.token_id).shown]
    for one, after in pairwise([*shown, Told(0, None, len(whole))]):
        piece = whole[one.offset : after.offset]
        data = tokenizer.token(one.token_id).data
        if piece:
            assert data.decode(errors="ignore").lstrip(" ") in (piece.lstrip(" "), "")
    assert "".join(whole[a.offset : b.offset] for a, b in pairwise([*told, Told(0, None, len(whole))])) == whole


def test_chat_template_and_developer_role():
    turns = (Message("developer", "be"), Message("user", "hi"))
    token_ids = BYTES.encode_now(Conversation(turns))
    expected = "<|bos|><|system|>be<|end|><|user|>hi<|end|><|assistant|>"
    assert BYTES._tokenizer.decode(token_ids) == expected
    assert token_ids.count(256) == 1


def test_what_goes_into_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.name }}:{{ m.tool_call_id }}:{{ m.content }};{% endfor %}"
        "{{ thinking }}{% if add_generation_prompt %}go{% endif %}{# developer #}"
    )
    own, user = Tokenizer(tokenizer), Message("user", "hi", name="bob")

    def rendered(*turns: Message, **fields: Any) -> str:
        return own.decode_all(own.encode_now(Conversation(turns, **fields)))

    assert rendered(user) == "user:bob::hi;go"
    assert rendered(user, generation_prompt=False) == "user:bob::hi;"
    assert rendered(user, template_fields={"thinking": "deep"}) == "user:bob::hi;deepgo"
    assert rendered(Message("developer", "d")) == "developer:::d;go"
    assert rendered(user, Message("tool", "t", tool_call_id="c1")) == "user:bob::hi;tool::c1:t;go"
    assert rendered(user, Message("function", "t", name="f")) == "user:bob::hi;tool:f::t;go"
    assert rendered(user, Message("assistant", "so"), generation_prompt=False, continues=True).endswith("so")


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "tools", "messages", "add_generation_prompt", "bos_token", "eos_token"]
)
def test_what_clients_may_not_tell_the_template(name):
    turns = (Message("user", "hi"),)
    with pytest.raises(InvalidRequest, match="leave it out") as refused:
        BYTES.encode_now(Conversation(turns, template_fields={name: "x"}))
    assert refused.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'tool' %}{{ 1 + m.content }}{% endif %}{% endfor %}",
    ],
)
def test_a_role_that_the_template_does_not_take(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InvalidRequest, match="does not take") as refused:
        Tokenizer(tokenizer).encode_now(Conversation((Message("user", "hi"), Message("tool", "t"))))
    assert refused.value.param == "messages[1].role"


def test_model_without_a_template_refuses_a_chat():
    with pytest.raises(InvalidRequest, match="no chat template; use /v1/completions"):
        FALLBACK.encode_now(Conversation((Message("user", "hi"),)))


def test_template_that_refuses_is_an_invalid_request():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        Tokenizer(tokenizer).encode_now(Conversation((Message("user", "hi"),)))
    tokenizer.chat_template = "{{ 1 + messages[0].content }}"
    with pytest.raises(InvalidRequest, match="refuses the messages: TypeError") as refused:
        Tokenizer(tokenizer).encode_now(Conversation((Message("user", "hi"),)))
    assert refused.value.param == "messages"


def test_long_and_short_prompts_encode_alike():
    for text in ("short", "long " * 2000, "very long " * 20_000):
        assert encoded(text) == [[256, *text.encode()]]
    assert encoded(array("I", [1, 2]), "a", "b" * 5000) == [[1, 2], [256, 97], [256, *b"b" * 5000]]


def encoded(*prompts: Prompt, limits: Limits = DEFAULT_LIMITS) -> list[list[int]]:
    return list(map(list, asyncio.run(BYTES.encode(prompts, limits=limits))))


@pytest.mark.parametrize(
    ("prompts", "where"),
    [
        (["a" * INLINE_CHARS], "MainThread"),
        (["a" * (INLINE_CHARS + 1)], "tokenize-short_0"),
        (["a" * (INLINE_CHARS // 2)] * 3, "tokenize-short_0"),
        (["a" * (SHORT_CHARS + 1)], "tokenize-long_0"),
        ([Conversation((Message("user", "a"),))], "MainThread"),
        ([Conversation((Message("user", "a"),) * (INLINE_CHARS // TURN_CHARS))], "tokenize-short_0"),
        ([Conversation((Message("user", "a", name="b" * INLINE_CHARS),))], "tokenize-short_0"),
        ([Conversation((Message("tool", "a", tool_call_id="b" * SHORT_CHARS),))], "tokenize-long_0"),
        ([Conversation((Message("user", "a"),), template_fields={"a": 1})], "tokenize-short_0"),
    ],
)
def test_where_work_is_done_follows_from_all_of_it(prompts, where, monkeypatch):
    own = Tokenizer(byte_tokenizer())
    seen = []
    monkeypatch.setattr(own, "encode_now", lambda *given: seen.append(threading.current_thread().name) or [])
    asyncio.run(own.encode(prompts))
    assert set(seen) == {where}
    own.close()


def test_a_short_text_does_not_wait_for_long_ones():
    own, order = Tokenizer(byte_tokenizer()), []
    free = threading.Event()

    async def work(name: str, chars: int, until: threading.Event | None = None) -> None:
        await own.aside(chars, lambda: until and until.wait(10))
        order.append(name)

    async def main() -> None:
        long = [asyncio.create_task(work("long", SHORT_CHARS + 1, free)) for _ in range(3)]
        await work("short", SHORT_CHARS)
        free.set()
        await asyncio.gather(*long)

    asyncio.run(main())
    assert order == ["short", "long", "long", "long"]
    own.close()


def test_token_ids_take_four_bytes_each():
    """As they came or as they were made, and the ones that came are not copied."""
    sent = array("I", [2**32 - 1, 7])
    came, made = asyncio.run(BYTES.encode([sent, "a" * 1000]))
    assert came is sent
    assert (made.itemsize, len(made)) == (4, 1001)


def test_tenants_take_turns_in_both_threads():
    own, order, free = Tokenizer(byte_tokenizer()), [], threading.Event()

    async def work(tenant: str, chars: int) -> None:
        await own.aside(chars, lambda: free.wait(10), tenant)
        order.append(tenant)

    async def main(chars: int) -> None:
        tasks = [asyncio.create_task(work(tenant, chars)) for tenant in "aaab"]
        await asyncio.sleep(0.05)
        free.set()
        await asyncio.gather(*tasks)

    for chars in (SHORT_CHARS, SHORT_CHARS + 1):
        order.clear()
        free.clear()
        asyncio.run(main(chars))
        assert order == ["a", "a", "b", "a"], "of the first tenant one has begun, and one is next"
    own.close()


def test_how_long_a_chat_may_be_as_its_template_has_it():
    chat = Conversation((Message("user", "hi"),))
    length = len(BYTES._chat.render(chat))
    for bound in (length, length + 1):
        assert len(encoded(chat, limits=Limits(prompt_chars=bound))) == 1
    with pytest.raises(InvalidRequest, match=f"have {length} characters as the model's chat template") as refused:
        encoded(chat, limits=Limits(prompt_chars=length - 1))
    assert refused.value.param == "messages"


def test_bad_words_are_barred_at_the_start_and_after_a_space():
    def tokens(tokenizer: Tokenizer, *words: str):
        return asyncio.run(tokenizer.bad_words(words))

    assert tokens(BYTES, "ab", " c", "ab") == ((97, 98), (99,))
    assert tokens(BYTES, *["b" * 200] * 20) == ((98,) * 200,), "many words are encoded in the thread"
    ids = FALLBACK._tokenizer.convert_tokens_to_ids
    assert tokens(FALLBACK, "he") == ((ids("\u2581he"),),)
    spaced = byte_fallback_tokenizer()
    spaced.backend_tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    assert tokens(Tokenizer(spaced), " he", "bhe") == (
        (ids("he"),),
        (ids("\u2581he"),),
        (ids("b"), ids("he")),
    )
    spaced.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    with pytest.raises(InvalidRequest, match="no token of this model") as refused:
        tokens(Tokenizer(spaced), "z")
    assert refused.value.param == "bad_words"


@pytest.mark.parametrize("token_ids", [[], [264], [-1], [0, 2**31]])
def test_token_ids_outside_of_the_vocabulary(token_ids):
    check_token_ids([0, 263], 264)
    with pytest.raises(InvalidRequest) as refused:
        check_token_ids(token_ids, 264)
    assert refused.value.param == "prompt"


def test_loading(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert loaded.encode_now("hé") == BYTES.encode_now("hé")
    assert loaded.has_chat_template
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"the tokenizer of .*empty cannot be loaded: "):
        load_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "model" / "tokenizer.json").write_text("{broken")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "model"))


def test_a_folder_that_is_not_on_this_host_is_told_so():
    """Workers say where it is, as seen from theirs."""
    with pytest.raises(ConfigError, match=r"^there is no folder /elsewhere/m on this host, and the tokenizer of "):
        load_tokenizer("/elsewhere/m")


def test_a_tokenizer_that_knows_no_text(tmp_path):
    """transformers makes one up from a config alone."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(ConfigError, match=r"makes no tokens of a text|cannot be loaded"):
        load_tokenizer(str(tmp_path))
