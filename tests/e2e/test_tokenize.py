"""`/tokenize` and `/detokenize`, and that they are what generation goes by."""

import httpx
import pytest
from e2e.cluster import Cluster

TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "h\u00e9 \U0001f600"}]


@pytest.fixture
def post(llama: Cluster):
    def send(path: str, **body) -> httpx.Response:
        return llama.http.post(path, json=body, headers={"Authorization": f"Bearer {llama.key}"})

    return send


def test_a_text(post, llama, prompts):
    text = prompts.text(40) + "\u20ac"
    told = post("/tokenize", model="llama", prompt=text).json()
    assert told == {"count": 44, "max_model_len": 1024, "tokens": [256, *text.encode()], "token_strs": None}
    assert llama.ask(text, max_tokens=1).prompt_token_ids == told["tokens"]
    assert post("/detokenize", model="llama", tokens=told["tokens"]).json() == {"prompt": "<|bos|>" + text}
    bare = post("/tokenize", prompt=text, add_special_tokens=False).json()
    assert bare["tokens"] == list(text.encode())
    assert post("/detokenize", tokens=bare["tokens"]).json() == {"prompt": text}
    assert llama.ask(text, max_tokens=1, add_special_tokens=False).prompt_token_ids == bare["tokens"]


def test_a_conversation(post, llama):
    told = post("/tokenize", messages=TURNS).json()
    assert llama.chat(TURNS, max_tokens=1).prompt_token_ids == told["tokens"]
    text = post("/detokenize", tokens=told["tokens"]).json()["prompt"]
    assert text == "<|bos|><|system|>be brief<|end|><|user|>h\u00e9 \U0001f600<|end|><|assistant|>"
    shut = post("/tokenize", messages=TURNS, add_generation_prompt=False).json()
    assert shut["tokens"] == told["tokens"][:-1]
    assert llama.chat(TURNS, max_tokens=1, add_generation_prompt=False).prompt_token_ids == shut["tokens"]


def test_names_of_tokens(post):
    told = post("/tokenize", prompt="a b", return_token_strs=True).json()
    assert told["token_strs"] == ["<|bos|>", "a", "\u0120", "b"]


def test_nothing(post):
    assert post("/detokenize", tokens=[]).json() == {"prompt": ""}
    assert post("/tokenize", prompt="", add_special_tokens=False).json()["tokens"] == []


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": TURNS}, 400, "prompt"),
        ("/tokenize", {"prompt": [1]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, 400, "chat_template_kwargs"),
        ("/tokenize", {"prompt": "a", "max_tokens": 5}, 400, "max_tokens"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [300]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, 404, "model"),
    ],
)
def test_refusals(path, body, status, param, post, llama):
    answer = post(path, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert llama.http.post(path, json=body).status_code == 401


def test_the_document(llama):
    document = llama.http.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    for path, operations in document["paths"].items():
        for method in operations:
            answer = llama.http.request(method, path.replace("{id}", "llama"))
            assert answer.status_code not in (404, 405, 500), (method, path)
