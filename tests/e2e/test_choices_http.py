"""Several answers, several prompts, and what is told of their tokens, by the `openai` package."""

from collections.abc import Iterable
from typing import Any

import openai
import pytest
import torch
from e2e.cluster import Cluster, until

DRAWN = {"temperature": 1, "seed": 20261120}
TURN = [{"role": "user", "content": "What is KV?"}]
CLOSE = 2e-3
POOL_S = 5


@pytest.fixture
def client(llama: Cluster):
    with client_of(llama) as client:
        yield client


def client_of(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.key, max_retries=0, timeout=60)


def create(client: openai.OpenAI, prompt: Any, **fields: Any):
    """A completion of `llama` of exactly `max_tokens` tokens, greedy unless `fields` say otherwise, with token ids."""
    extra = {"ignore_eos": True, "return_token_ids": True, **fields.pop("extra", {})}
    return client.completions.create(
        **{"model": "llama", "prompt": prompt, "max_tokens": 16, "temperature": 0, "extra_body": extra, **fields}
    )


def by_choice(chunks: Iterable[Any]) -> dict[int, dict[str, Any]]:
    """What a stream says of each choice, put together."""
    told: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = told.setdefault(choice.index, {"ids": [], "text": "", "reasons": [], "told": []})
            one["ids"] += choice.token_ids
            one["text"] += choice.text
            one["reasons"] += [choice.finish_reason] if choice.finish_reason else []
            one["told"] += choice.logprobs.token_logprobs if choice.logprobs else []
    return told


def ids(answer: Any) -> list[list[int]]:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [choice.token_ids for choice in answer.choices]


def log_softmax(answer) -> torch.Tensor:
    """Of the oracle's logits: `[tokens, vocab]`."""
    return answer.logits.float().log_softmax(-1)


def test_three_answers_are_the_same_each_time(client, llama, prompts):
    """Filled, continued alone, pulled, streamed; the first of them is what one answer would be."""
    prompt = prompts.tokens(150)
    cold = create(client, prompt, n=3, **DRAWN)
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert cold.usage.kvferry["computed"]["prefill"] == 150, "nothing was handed over"
    assert (cold.usage.prompt_tokens, cold.usage.completion_tokens) == (150, 48), "the prompt counts once"
    assert len({tuple(tokens) for tokens in ids(cold)}) == 3
    assert [choice.finish_reason for choice in cold.choices] == ["length"] * 3
    for choice in cold.choices:
        shown = bytes(token for token in choice.token_ids if token < 256)
        assert choice.text == shown.decode(errors="replace")
        assert choice.prompt_token_ids == prompt
    warm = create(client, prompt, n=3, **DRAWN)
    assert warm.usage.prompt_tokens_details.cached_tokens == 144
    llama.flush(prompts)
    pulled = create(client, prompt, n=3, **DRAWN)
    assert pulled.usage.kvferry["reused"] == {"gpu": 0, "host": 144}
    again = create(client, prompt, n=3, extra={"cache_salt": "another"}, **DRAWN)
    assert again.usage.prompt_tokens_details.cached_tokens == 0
    streamed = by_choice(create(client, prompt, n=3, stream=True, **DRAWN))
    assert ids(cold) == ids(warm) == ids(pulled) == ids(again) == [streamed[i]["ids"] for i in range(3)]
    assert [streamed[i]["text"] for i in range(3)] == [choice.text for choice in cold.choices]
    assert [streamed[i]["reasons"] for i in range(3)] == [["length"]] * 3
    assert ids(create(client, prompt, **DRAWN)) == ids(cold)[:1]
    short = prompts.tokens(10)
    assert ids(create(client, short, n=3, **DRAWN))[:1] == ids(create(client, short, **DRAWN))
    greedy = ids(create(client, short, n=3, best_of=None))
    assert greedy[0] == greedy[1] == greedy[2]


def test_a_stop_string_ends_its_choice_alone(client, llama, prompts):
    prompt = prompts.tokens(60)
    whole = create(client, prompt, n=3, max_tokens=24, **DRAWN)
    stop = whole.choices[1].text[6:9]
    texts = [choice.text for choice in whole.choices]
    expected = [text.partition(stop)[0] for text in texts]
    assert expected[1] != texts[1]
    assert expected.count(texts[0]) or expected.count(texts[2]), "all would end"
    cut = create(client, prompt, n=3, max_tokens=24, stop=[stop], **DRAWN)
    assert [choice.text for choice in cut.choices] == expected
    reasons = ["length" if text == kept else "stop" for text, kept in zip(texts, expected, strict=True)]
    assert [choice.finish_reason for choice in cut.choices] == reasons
    assert cut.usage.completion_tokens == sum(map(len, ids(cut))) < 72
    streamed = by_choice(create(client, prompt, n=3, max_tokens=24, stop=[stop], stream=True, **DRAWN))
    assert [streamed[i]["text"] for i in range(3)] == expected
    assert [streamed[i]["reasons"] for i in range(3)] == [[reason] for reason in reasons]
    endless = create(client, prompt, n=3, max_tokens=900, stop=list({text[5] for text in texts}), **DRAWN)
    assert [choice.finish_reason for choice in endless.choices] == ["stop"] * 3
    until(lambda: not llama.busy(), POOL_S, "idle, as all of them have ended")


def test_log_probabilities_are_those_of_transformers(client, oracle, prompts):
    """Filled by another process, then from the cache; whole and streamed."""
    prompt = prompts.tokens(70)
    reference = oracle.answer(prompt, 16)
    expected, best = log_softmax(reference), log_softmax(reference).topk(5)
    for _ in range(2):
        (choice,) = create(client, prompt, logprobs=5).choices
        assert oracle.refuses(prompt, choice.token_ids) == ""
        told = choice.logprobs
        assert "".join(told.tokens) == choice.text
        assert [choice.text[start : start + 1] for start in told.text_offset] == told.tokens
        own = [row[token].item() for row, token in zip(expected, choice.token_ids, strict=True)]
        assert told.token_logprobs == pytest.approx(own, abs=CLOSE)
        for top, values, found in zip(told.top_logprobs, best.values, best.indices, strict=True):
            assert len(top) == 5
            assert sorted(top.values(), reverse=True) == pytest.approx(values.tolist(), abs=CLOSE)
            assert {chr(token) for token in found.tolist() if 32 <= token < 127} <= set(top)
        streamed = by_choice(create(client, prompt, logprobs=5, stream=True))
        assert streamed[0]["told"] == pytest.approx(told.token_logprobs, abs=1e-4)


def test_log_probabilities_of_a_chat(client, oracle):
    extra = {"ignore_eos": True, "return_token_ids": True}
    fields = {"model": "llama", "messages": TURN, "max_tokens": 12, "temperature": 0, "n": 2, "extra_body": extra}
    whole = client.chat.completions.create(logprobs=True, top_logprobs=3, **fields)
    expected = log_softmax(oracle.answer(whole.prompt_token_ids, 12))
    for choice in whole.choices:
        content = choice.logprobs.content
        assert "".join(one.token for one in content) == choice.message.content
        assert [one.bytes for one in content] == [[token] for token in choice.token_ids]
        for one, token, row in zip(content, choice.token_ids, expected, strict=True):
            assert one.logprob == pytest.approx(row[token].item(), abs=CLOSE)
            assert [top.logprob for top in one.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=CLOSE)
            assert one.top_logprobs[0].token == one.token, "greedy takes the likeliest"
    streamed: dict[int, list[Any]] = {0: [], 1: []}
    roles = []
    for chunk in client.chat.completions.create(logprobs=True, top_logprobs=3, stream=True, **fields):
        (choice,) = chunk.choices
        roles += [choice.index] if choice.delta.role else []
        streamed[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert sorted(roles) == [0, 1]
    assert [[one.token for one in told] for told in streamed.values()] == [
        [one.token for one in choice.logprobs.content] for choice in whole.choices
    ]


def test_the_prompt_is_scored(client, oracle, prompts):
    """Although its KV is known; as vLLM tells it, and as OpenAI does beside an echo."""
    text = prompts.text(69)
    create(client, text)
    scored = create(client, text, n=2, max_tokens=2, extra={"prompt_logprobs": 2})
    prompt = scored.choices[0].prompt_token_ids
    assert prompt == [256, *text.encode()]
    assert scored.usage.prompt_tokens_details.cached_tokens == 0
    assert scored.usage.kvferry["computed"] == {"prefill": 0, "decode": 70}
    expected = prompt_log_softmax(oracle, prompt)
    for choice in scored.choices:
        assert choice.prompt_logprobs[0] is None
        for told, token, row in zip(choice.prompt_logprobs[1:], prompt[1:], expected, strict=True):
            own, best = told[str(token)], row.topk(2)
            assert own["logprob"] == pytest.approx(row[token].item(), abs=CLOSE)
            assert own["rank"] == 1 + int((row > row[token]).sum())
            assert own["decoded_token"] == chr(token)
            assert {str(token) for token in best.indices.tolist()} <= set(told)
            assert sorted(one["rank"] for one in told.values())[:2] == [1, 2]
    for max_tokens in (0, 4):
        for stream in (False, True):
            echoed = create(client, text, n=2, echo=True, logprobs=1, max_tokens=max_tokens, stream=stream)
            check_echo(echoed, stream, text, prompt, max_tokens, expected)
    fields = {"model": "llama", "messages": TURN, "max_tokens": 1, "temperature": 0}
    chat = client.chat.completions.create(extra_body={"prompt_logprobs": 0, "return_token_ids": True}, **fields)
    assert [list(told or ()) for told in chat.prompt_logprobs] == [
        [], *([str(token)] for token in chat.prompt_token_ids[1:])]  # fmt: skip


@torch.inference_mode()
def prompt_log_softmax(oracle, prompt: list[int]) -> torch.Tensor:
    """Entry i is about token i + 1."""
    return oracle._model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)


def check_echo(echoed, stream: bool, text: str, prompt: list[int], max_tokens: int, expected: torch.Tensor) -> None:
    own = [row[token].item() for row, token in zip(expected, prompt[1:], strict=True)]
    if stream:
        told = by_choice(echoed)
        answers = [(told[i]["text"], told[i]["ids"], told[i]["told"], told[i]["reasons"]) for i in range(2)]
    else:
        assert echoed.usage.completion_tokens == 2 * max_tokens
        answers = [(c.text, c.token_ids, c.logprobs.token_logprobs, [c.finish_reason]) for c in echoed.choices]
        for choice in echoed.choices:
            assert choice.logprobs.tokens[:2] == ["<|bos|>", text[0]]
            assert choice.logprobs.text_offset == [0, *range(len(text) + max_tokens)]
            assert choice.logprobs.top_logprobs[0] is None
    for said, token_ids, logprobs, reasons in answers:
        assert said == text + bytes(token_ids).decode()
        assert len(token_ids) == max_tokens
        assert logprobs[0] is None
        assert logprobs[1:70] == pytest.approx(own, abs=CLOSE)
        assert len(logprobs) == 70 + max_tokens
        assert reasons == ["length"]


def test_an_echo_alone_reads_the_cache(client, prompts):
    text = prompts.text(69)
    first = create(client, text, echo=True)
    again = create(client, text, echo=True)
    assert again.usage.prompt_tokens_details.cached_tokens == 64
    assert again.choices[0].text == first.choices[0].text == text + bytes(first.choices[0].token_ids).decode()
    assert first.choices[0].logprobs is None


@pytest.mark.parametrize("kind", ["texts", "token ids"])
def test_a_batch_is_as_many_requests(kind, client, llama, prompts):
    """Numbered prompt by prompt; each prompt in the account."""
    batch = [prompts.text(n) if kind == "texts" else prompts.tokens(n) for n in (100, 5, 40, 100)]
    llama.settle()
    alone = [create(client, prompt, n=2, extra={"cache_salt": "one"}, **DRAWN) for prompt in batch]
    together = create(client, batch, n=2, extra={"cache_salt": "two"}, **DRAWN)
    assert ids(together) == [tokens for answer in alone for tokens in ids(answer)]
    assert [choice.text for choice in together.choices] == [c.text for answer in alone for c in answer.choices]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(together.usage, name) == sum(getattr(answer.usage, name) for answer in alone)
    account = together.usage.kvferry
    assert sum(account["reused"].values()) + sum(account["computed"].values()) == together.usage.prompt_tokens
    assert account["attempts"] == 4
    streamed = by_choice(create(client, batch, n=2, stream=True, **DRAWN))
    assert [streamed[i]["ids"] for i in range(8)] == ids(together)
    assert [streamed[i]["reasons"] for i in range(8)] == [["length"]] * 8


def test_a_large_batch(client, llama, prompts):
    """More than run at once."""
    batch = [prompts.tokens(3 + i % 20) for i in range(70)]
    together = create(client, batch, max_tokens=3)
    assert [choice.prompt_token_ids for choice in together.choices] == batch
    assert [len(tokens) for tokens in ids(together)] == [3] * 70
    assert ids(create(client, batch[50], max_tokens=3)) == ids(together)[50:51]
    until(lambda: not llama.busy(), POOL_S, "idle")


def test_one_bad_prompt_fails_the_batch(client, llama, prompts):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            create(client, [prompts.tokens(5), [1, 300]], stream=stream)
        assert refused.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, prompts.tokens(5), n=65)
    assert "n is 65; this server gives at most 64 answers to a prompt" in refused.value.message
    until(lambda: not llama.busy(), POOL_S, "idle")


def test_equal_prompts_without_a_seed_differ(client, prompts):
    prompt = prompts.tokens(20)
    first, second = ids(create(client, [prompt, prompt], temperature=1))
    assert first != second


def test_a_client_that_goes_takes_all_its_choices_along(client, llama, prompts):
    llama.settle()
    stream = create(client, [prompts.tokens(60), prompts.tokens(70)], n=3, max_tokens=800, stream=True)
    seen = {choice.index for chunk, _ in zip(stream, range(40), strict=False) for choice in chunk.choices}
    assert len(seen) == 6
    stream.close()
    until(lambda: not llama.busy(), POOL_S, "idle")


def test_a_priority_is_taken(client, prompts):
    """Which of a tenant's requests goes first the engine decides; here that it is told at all, and changes no token."""
    prompt = prompts.tokens(40)
    assert ids(create(client, prompt, extra={"priority": -7})) == ids(create(client, prompt, extra={"priority": 7}))


class TestDeadDecode:
    @pytest.mark.parametrize(
        "known", [pytest.param(False, id="cold"), pytest.param(True, id="warm", marks=pytest.mark.long)]
    )
    def test_decode_killed_with_three_choices(self, known, slow, prompts):
        """Each goes on after its own last token; the prompt counts once, and as found before the failure."""
        cluster = slow
        prompt, decode = prompts.tokens(150), cluster.of_role("decode")
        fields = {"n": 3, "max_tokens": 200, "logprobs": 0, **DRAWN}
        if known:
            cluster.ask(prompt, max_tokens=2)
        with client_of(cluster) as client:
            stream = create(client, prompt, stream=True, stream_options={"include_usage": True}, **fields)
            chunks = []
            for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == 60:
                    decode.kill()
            told = by_choice(chunks)
            usage = chunks[-1].usage
            before = {choice.index for chunk in chunks[:60] for choice in chunk.choices}
            assert before == {0, 1, 2}
            assert [len(told[i]["ids"]) for i in range(3)] == [200] * 3
            assert [len(told[i]["told"]) for i in range(3)] == [200] * 3
            assert [told[i]["reasons"] for i in range(3)] == [["length"]] * 3
            assert usage.completion_tokens == 600
            assert usage.kvferry["attempts"] == 2
            assert usage.prompt_tokens_details.cached_tokens == (144 if known else 0), "a failover changed it"
            account = usage.kvferry
            assert sum(account["reused"].values()) + sum(account["computed"].values()) == 150
            until(lambda: all(node["ready"] for node in cluster.nodes()["nodes"]), 30, "decode back")
            whole = create(client, prompt, **fields)
        assert ids(whole) == [told[i]["ids"] for i in range(3)]
        for i, choice in enumerate(whole.choices):
            assert told[i]["text"] == choice.text
            assert told[i]["told"] == pytest.approx(choice.logprobs.token_logprobs, abs=CLOSE)
        until(lambda: not cluster.busy(), POOL_S, "idle")
