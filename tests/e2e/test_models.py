"""Two models behind one router that was told of none: their workers announce them."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from checkpoints import tiny_checkpoint
from e2e.cluster import KVFERRY, Prompts, free_port, until
from oracle import Oracle

START_S = 60.0


@dataclass
class House:
    url: str
    workers: dict[str, subprocess.Popen]
    oracles: dict[str, Oracle]

    def models(self) -> list[str]:
        return [model["id"] for model in httpx.get(f"{self.url}/v1/models", timeout=10).json()["data"]]

    def ask(self, model: str, prompt: list[int]) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("models")
    checkpoints = {name: tiny_checkpoint(folder / name, "llama", seed, True) for seed, name in enumerate("ab", 1)}
    port = free_port()

    def worker(role: str, model: str) -> list[str]:
        flags = [f"--listen=unix:{folder}/{role}-{model}", f"--store={folder}/store", "--threads=1", "--dtype=float32"]
        names = [f"--served-model-name={name}-{model}" for name in ("model", "also")]
        return [role, str(checkpoints[model]), *names, "--num-gpu-blocks-override=64", "--max-num-seqs=8", *flags]

    commands = {
        "store": ["store", f"--socket={folder}/store", "--size=16MiB"],
        "a": worker("decode", "a"),
        "prefill a": worker("prefill", "a"),
        "b": worker("decode", "b"),
        "router": [
            "router", f"--port={port}", "--admin-port=0", f"--store={folder}/store", "--max-local-prefill-length=8",
            f"--prefill=unix:{folder}/prefill-a", "--node-wait-seconds=0.5",
            *(f"--decode=unix:{folder}/decode-{name}" for name in checkpoints),
        ],
    }  # fmt: skip
    with ExitStack() as stack, open(folder / "log", "wb") as log:
        workers = {}
        for name, arguments in commands.items():
            workers[name] = stack.enter_context(subprocess.Popen([*KVFERRY, *arguments], stdout=log, stderr=log))
            stack.callback(workers[name].kill)
        oracles = {name: Oracle(path) for name, path in checkpoints.items()}
        house = House(f"http://127.0.0.1:{port}", workers, oracles)

        def all_there() -> bool:
            died = [name for name, process in workers.items() if process.poll() is not None]
            assert not died, f"{died} ended: {Path(folder / 'log').read_text()[-3000:]}"
            try:
                return house.models() == ["model-a", "also-a", "model-b", "also-b"]
            except httpx.TransportError:
                return False

        until(all_there, START_S, "both models served")
        yield house


def test_each_request_is_answered_by_the_model_it_names(house):
    prompts = Prompts("two models")
    for _ in range(3):
        prompt = prompts.tokens(40)
        answers = {name: house.ask(f"model-{name}", prompt).json() for name in house.oracles}
        for name, oracle in house.oracles.items():
            assert answers[name]["model"] == f"model-{name}"
            assert oracle.refuses(prompt, answers[name]["choices"][0]["token_ids"]) == ""
        assert answers["a"]["usage"]["kvferry"]["computed"]["prefill"] >= 32, "a has a prefill node"
        assert answers["b"]["usage"]["kvferry"]["computed"]["decode"] == 40, "b has none, and a's is not for it"
        assert answers["b"]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "what a has computed is not b's"


def test_a_model_answers_to_each_of_its_names_by_its_first(house):
    prompt = Prompts("names").tokens(20)
    for name, oracle in house.oracles.items():
        answer = house.ask(f"also-{name}", prompt).json()
        assert answer["model"] == f"model-{name}"
        assert oracle.refuses(prompt, answer["choices"][0]["token_ids"]) == ""


def test_no_more_answers_are_promised_than_workers_give(house):
    """The router alone would allow 64, until it hears of them."""
    body = {"model": "model-a", "prompt": [65], "n": 9}
    refused = httpx.post(f"{house.url}/v1/completions", json=body, timeout=10)
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        400, "n is 9; the workers of model-a give at most 8 answers to a prompt")  # fmt: skip
    fields = httpx.get(f"{house.url}/openapi.json", timeout=10).json()["components"]["schemas"]["ChatBody"][
        "properties"
    ]
    assert fields["n"]["anyOf"][0]["maximum"] == 8


def test_which_models_there_are(house):
    unknown = house.ask("model-c", [65])
    assert unknown.status_code == 404
    assert unknown.json()["error"]["message"] == (
        "the model 'model-c' is not served here; 'model-a', 'model-b' are")  # fmt: skip
    for name in ("model-a", "model-b"):
        assert httpx.get(f"{house.url}/v1/models/{name}", timeout=10).json()["id"] == name
    whose = httpx.post(f"{house.url}/tokenize", json={"prompt": "x"}, timeout=10)
    assert (whose.status_code, whose.json()["error"]["param"]) == (400, "model")


def test_one_model_goes_and_the_other_stays(house):
    house.workers["b"].kill()
    until(lambda: house.models() == ["model-a", "also-a"], 10, "b gone from the list")
    before = time.monotonic()
    gone = house.ask("model-b", [65, 66])
    assert (gone.status_code, time.monotonic() - before < 5) == (503, True)
    assert gone.headers["Retry-After"]
    prompt = Prompts("the one that stays").tokens(20)
    assert house.oracles["a"].refuses(prompt, house.ask("model-a", prompt).json()["choices"][0]["token_ids"]) == ""
