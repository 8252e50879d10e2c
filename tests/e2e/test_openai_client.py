"""The `openai` package, as people use it."""

import openai
import pytest
from e2e.cluster import Cluster, credential

TURN = [{"role": "user", "content": "What is KV?"}]
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}


@pytest.fixture
def client(llama: Cluster):
    with openai.OpenAI(base_url=f"{llama.url}/v1", api_key=llama.key, max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    (model,) = client.models.list().data
    return model.id


def test_completion(client, model, oracle, prompts):
    prompt = prompts.tokens(70)
    whole = client.completions.create(model=model, prompt=prompt, max_tokens=20, **GREEDY)
    assert oracle.refuses(prompt, whole.choices[0].token_ids) == ""
    assert whole.choices[0].finish_reason == "length"
    assert bytes(whole.choices[0].token_ids).decode() == whole.choices[0].text
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (70, 20, 90)
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    again = client.completions.create(model=model, prompt=prompt, max_tokens=20, **GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens == 64
    assert again.choices[0].text == whole.choices[0].text
    assert again.id != whole.id


def test_the_only_model_need_not_be_named(llama, model):
    for path, asked in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": TURN})):
        body = asked | {"max_tokens": 2}
        assert llama.http.post(path, json=body, headers=credential(llama.key)).json()["model"] == model
        with llama.stream(path, body | {"stream": True}, llama.key) as stream:
            assert {chunk["model"] for chunk in stream} == {model}


def test_completion_stream(client, model, oracle, prompts):
    prompt = prompts.tokens(70)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model=model, prompt=prompt, max_tokens=20, **options, **GREEDY))
    *parts, last = chunks
    assert oracle.refuses(prompt, [t for part in parts for t in part.choices[0].token_ids]) == ""
    assert parts[0].choices[0].prompt_token_ids == prompt
    assert [part.choices[0].finish_reason for part in parts][-2:] == [None, "length"]
    assert all(part.usage is None for part in parts)
    assert last.choices == []
    assert last.usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(parts) > 20, "tokens are to come one by one"


def test_chat(client, model):
    whole = client.chat.completions.create(model=model, messages=TURN, max_completion_tokens=12, **GREEDY)
    message = whole.choices[0].message
    assert (message.role, message.refusal, message.tool_calls) == ("assistant", None, None)
    assert len(message.content) == whole.usage.completion_tokens == 12
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=model, messages=TURN, max_tokens=12, **options, **GREEDY))
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == message.content
    assert parts[-1].choices[0].finish_reason == "length"
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stop_string_ends_it(client, model, prompts):
    prompt = prompts.tokens(70)
    whole = client.completions.create(model=model, prompt=prompt, max_tokens=20, **GREEDY).choices[0].text
    stop = whole[8:10]
    cut = client.completions.create(model=model, prompt=prompt, max_tokens=20, stop=[stop], **GREEDY)
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == whole[: whole.index(stop)]


def test_a_stop_string_across_chunks(client, model, prompts):
    """Nothing of it is sent, however the tokens come; why it ended is told."""
    prompt = prompts.tokens(70)
    whole = client.completions.create(model=model, prompt=prompt, max_tokens=20, **GREEDY).choices[0].text
    stop = whole[6:11]
    assert whole.index(stop) == 6
    for included in (False, True):
        extra = {"extra_body": GREEDY["extra_body"] | {"include_stop_str_in_output": included}, "temperature": 0}
        chunks = list(
            client.completions.create(model=model, prompt=prompt, max_tokens=20, stop=stop, stream=True, **extra)
        )
        end = whole.index(stop) + (len(stop) if included else 0)
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:end]
        assert (chunks[-1].choices[0].finish_reason, chunks[-1].choices[0].stop_reason) == ("stop", stop)


def test_min_tokens_before_a_stop_string(client, model, prompts):
    prompt = prompts.tokens(70)
    whole = client.completions.create(model=model, prompt=prompt, max_tokens=20, **GREEDY).choices[0].text
    extra = {"extra_body": GREEDY["extra_body"] | {"min_tokens": 12}, "temperature": 0}
    stops = list(set(whole[:13]))
    cut = client.completions.create(model=model, prompt=prompt, max_tokens=20, stop=stops, **extra)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (whole[:12], "stop")
    assert cut.usage.completion_tokens == 13


async def ask_without_reading(client: openai.AsyncOpenAI, model: str) -> list[str]:
    texts = []
    async for chunk in await client.completions.create(model=model, prompt="Hello", stream=True, max_tokens=5):
        texts.append(chunk.choices[0].text)
    return texts


def test_the_async_client(llama, model):
    import asyncio

    async def run() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{llama.url}/v1", api_key=llama.key, max_retries=0) as client:
            return await asyncio.gather(*[ask_without_reading(client, model) for _ in range(5)])

    assert all(texts for texts in asyncio.run(run()))


def test_refusals_are_the_packages_own(client, llama, model):
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="kvf-nobody").completions.create(model=model, prompt="a")
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="gpt-17", prompt="a")
    assert "gpt-17" in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt="a", n=129)
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=model, messages=TURN, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt="a", temperature=3)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt="a", stream=True, max_tokens=100000)
    assert refused.value.param == "max_tokens"


def test_habits(client, model):
    """What clients send by habit and what changes nothing is taken."""
    habits = {"n": 1, "user": "me", "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
    assert client.completions.create(model=model, prompt="a", max_tokens=1, best_of=1, echo=False, **habits).choices
    assert client.chat.completions.create(model=model, messages=TURN, max_tokens=1, store=False, **habits).choices
