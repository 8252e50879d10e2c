"""The `openai` package where answers come in pieces: characters of several tokens, many streams, streams cut short, and
every error that it knows.

The model says a text of its own: after each byte the one that comes next in TEXT, whatever was before.
"""

import asyncio
from pathlib import Path

import openai
import pytest
import torch
from checkpoints import tiny_checkpoint
from e2e.cluster import Cluster, free_port, until
from safetensors.torch import load_file, save_file

# An emoji, a letter and its accent, a sign of three bytes, two of two bytes, one of them right to left: no byte twice.
TEXT = "\U0001f600e\u0301\u20ac\u05e9\u00f1."
DATA = TEXT.encode()
STREAMS = 50


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which nothing but the last token counts."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("speaker"), "llama", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "o_proj" in name or "down_proj" in name:
            weight.zero_()
    known = weights["model.embed_tokens.weight"]
    known.normal_(generator=torch.Generator().manual_seed(0))
    weights["model.norm.weight"].fill_(1.0)
    head = weights["lm_head.weight"].zero_()
    for before, after in zip(DATA, [*DATA[1:], DATA[0]], strict=True):
        head[after] = known[before]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def cluster(own, checkpoints, speaker) -> Cluster:
    checkpoints["speaker"] = speaker
    return own(f"--max-concurrent={2 * STREAMS}", "--max-body-size=100000", "--request-seconds=60", arch="speaker")


@pytest.fixture
def client(cluster: Cluster):
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def one_token_at_a_time(chunks) -> tuple[list[str], bytes]:
    texts, data = [], b""
    for chunk in chunks:
        (choice,) = chunk.choices
        assert len(choice.token_ids) <= 1
        data += bytes(choice.token_ids)
        texts.append(choice.text if hasattr(choice, "text") else choice.delta.content or "")
    return texts, data


@pytest.mark.parametrize("rounds", [1, 7])
def test_characters_of_several_tokens(rounds, client, model):
    """Each comes when its last token does; no chunk has half of one."""
    chunks = client.completions.create(
        model=model, prompt=[DATA[-1]], max_tokens=rounds * len(DATA), temperature=0, stream=True,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    texts, data = one_token_at_a_time(chunks)
    assert data == DATA * rounds
    assert [text for text in texts if text] == list(TEXT) * rounds


def test_a_character_cut_short(client, model):
    """The end of the answer is in the middle of it."""
    chunks = client.completions.create(
        model=model, prompt=[DATA[-1]], max_tokens=2, temperature=0, stream=True, extra_body={"return_token_ids": True}
    )
    texts, data = one_token_at_a_time(chunks)
    assert ("".join(texts), data) == ("\ufffd", DATA[:2])


def test_a_stop_string_of_several_tokens(client, model):
    asked = {"model": model, "prompt": [DATA[-1]], "max_tokens": 50, "temperature": 0, "stop": ["\u0301\u20ac\u05e9"]}
    assert client.completions.create(**asked).choices[0].text == "\U0001f600e"
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "\U0001f600e"


def many_clients(cluster: Cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.key, max_retries=0, timeout=60)


def test_many_streams_at_once(cluster, model):
    """Each gets all of its own answer."""
    tokens = 5 * len(DATA)

    async def run() -> list[str]:
        async with many_clients(cluster) as client:

            async def read(number: int) -> str:
                prompt = [DATA[number % len(DATA)]]
                asked = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": True}
                stream = await client.completions.create(prompt=prompt, **asked)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*[read(number) for number in range(STREAMS)])

    for number, text in enumerate(asyncio.run(run())):
        begun = number % len(DATA) + 1
        assert text == (DATA[begun:] + DATA * 5)[:tokens].decode(errors="replace")


def test_one_request_too_many(cluster, model):
    """It is told to come back, and may once another has gone."""

    async def run() -> None:
        asked = {"model": model, "prompt": [DATA[0]], "temperature": 0}
        async with many_clients(cluster) as client:
            asking = [asyncio.create_task(client.completions.create(max_tokens=1000, **asked)) for _ in range(STREAMS)]
            full = f"kvferry_open_requests {STREAMS}.0"
            await asyncio.to_thread(until, lambda: full in cluster.admin("/metrics").text, 20, "full")
            with pytest.raises(openai.InternalServerError) as refused:
                await client.completions.create(max_tokens=1, **asked)
            assert (refused.value.status_code, refused.value.code) == (503, "overloaded")
            assert int(refused.value.response.headers["Retry-After"]) >= 1
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)

    asyncio.run(run())
    until(lambda: not cluster.busy(), 5, "idle")
    assert len(cluster.ask([DATA[0]], max_tokens=2).token_ids) == 2


def test_a_stream_cut_short(cluster, client, model):
    """By its reader: what it held is free again, and the client goes on."""
    cluster.settle()
    with client.completions.create(
        model=model, prompt=[DATA[-1]] * 100, max_tokens=900, temperature=0, stream=True
    ) as stream:
        assert next(iter(stream)).choices[0].text
    until(lambda: not cluster.busy(), 5, "idle")
    again = client.completions.create(model=model, prompt=[DATA[-1]], max_tokens=len(DATA), temperature=0)
    assert again.choices[0].text == TEXT


@pytest.mark.parametrize(
    ("asked", "error", "status", "param"),
    [
        ({"temperature": 3}, openai.BadRequestError, 400, "temperature"),
        ({"extra_body": {"suffix": "x"}}, openai.BadRequestError, 400, "suffix"),
        ({"logit_bias": {"9000": 1}}, openai.BadRequestError, 400, "logit_bias"),
        ({"model": "gpt-17"}, openai.NotFoundError, 404, "model"),
        ({"prompt": "x" * 200_000}, openai.APIStatusError, 413, None),
        ({"extra_body": {"timeout": 0.05}, "max_tokens": 900}, openai.InternalServerError, 504, None),
    ],
)
def test_errors_by_their_status(asked, error, status, param, client, model):
    with pytest.raises(error) as refused:
        client.completions.create(**({"model": model, "prompt": [DATA[0]], "temperature": 0} | asked))
    assert (refused.value.status_code, refused.value.param) == (status, param)
    assert refused.value.message
    assert refused.value.request_id


def test_errors_without_a_status(client, model):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(model=model, prompt=[DATA[0]], max_tokens=900)
    nobody = client.with_options(base_url=f"http://127.0.0.1:{free_port()}/v1")
    with pytest.raises(openai.APIConnectionError):
        nobody.completions.create(model=model, prompt="a")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="kvf-nobody").models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-17")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=model, input="a")
    assert client.models.retrieve(model).id == model


def test_an_error_after_the_first_byte(client, model):
    """It is an event of the stream, which the package raises, and the end mark does not come."""
    stream = client.completions.create(
        model=model, prompt=[DATA[-1]], max_tokens=1000, temperature=0, stream=True, extra_body={"timeout": 1.0}
    )
    said = []
    with pytest.raises(openai.APIError) as ended:
        said.extend(chunk.choices[0].text for chunk in stream)
    assert "".join(said).startswith(TEXT)
    assert ended.value.code == "timeout"
