"""What a whole system writes to its logs: lines that machines read, with the request they belong to, and no secrets."""

import json
import re
import tomllib
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from e2e.cluster import Cluster, credential, until
from e2e.conftest import TENANTS_FILE

from kvferry.cli.progress import SILENT_S


def requests_of(cluster: Cluster, begin: int = 0) -> dict[tuple[str, str], list[str]]:
    """Messages by role and request."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in lines_of(cluster, begin):
        if "request_id" in line:
            found.setdefault((line["role"], line["request_id"]), []).append(line["message"])
    return found


def lines_of(cluster: Cluster, begin: int = 0) -> list[dict]:
    """Every line from the `begin`th on. One says that it is ready."""
    lines = [json.loads(line) for line in cluster.log.read_text().splitlines()]
    assert sum(line["message"].startswith("kvferry is ready: http://127.0.0.1:") for line in lines) == 1
    return lines[begin:]


@pytest.fixture
def cluster(pairs) -> Cluster:
    """It tells of everything, and has been hurt before."""
    pairs.settle()
    return pairs


def ask(cluster: Cluster, request_id: str, prompt: list[int] | str, **fields) -> int:
    body = cluster.body(prompt, **fields)
    headers = {**credential(cluster.key), "X-Request-Id": request_id}
    return cluster.http.post("/v1/completions", json=body, headers=headers).status_code


def test_a_start_is_told_step_by_step(llama):
    """In words, of each process; and nobody waits for long without one."""
    lines = lines_of(llama)
    told = [line["message"] for line in lines]
    ready = next(at for at, message in enumerate(told) if message.startswith("kvferry is ready"))
    for name, steps in (
        ("store", ("starting", "taking memory for the store", "ready")),
        ("decode-0", ("starting", "loading its libraries", "taking the weights' fingerprint", "reading the weights",
                      "checking the model; a machine's first start compiles kernels here", "ready")),
        ("router", ("starting", "loading its libraries", "waiting for the workers", "ready")),
    ):  # fmt: skip
        at = [told.index(f"{name}: {step}") for step in steps]
        assert at == sorted(at)
        assert at[-1] < ready
    times = [datetime.fromisoformat(line["time"]).timestamp() for line in lines[: ready + 1]]
    assert max(late - early for early, late in pairwise(times)) < 3 * SILENT_S


def test_lines_of_a_request_have_its_id_and_a_role(cluster, prompts, probe_of):
    probe, prompt = probe_of(cluster), prompts.tokens(160)
    assert ask(cluster, "a-first", prompt) == 200
    assert ask(cluster, "refused", prompt, model="another") == 404
    cluster.flush(prompts)
    probe.flip(probe.names(prompt)[5])
    assert ask(cluster, "a-bad-block", prompt) == 200
    cluster.settle()
    found = requests_of(cluster)
    refusal = "POST /v1/completions refused: 404 model_not_found, for model"
    assert refusal in found["router", "refused"][0]
    answered = r"completion for tenant [0-9a-f]{16}: ok, 160 prompt tokens, \d+ generated, \d+ ms"
    assert re.search(answered, found["router", "a-first"][0])
    assert re.search(r"a block in slot \d+ failed verification", found["decode", "a-bad-block"][0])


def test_a_worker_that_dies_is_told_under_the_request(cluster, prompts):
    begin = len(lines_of(cluster))
    with cluster.open(prompts.tokens(100), max_tokens=400) as stream:
        stream.read_tokens(1)
        streams = until(lambda: [cluster.node("decode", number)["streams"] for number in (0, 1)], 5, "told")
        cluster.of_role("decode", streams.index(1)).kill()
        assert len(stream.rest().token_ids) == 400
    until(
        lambda: any("attempt 1 failed" in told for of in requests_of(cluster, begin).values() for told in of), 5, "told"
    )
    assert any(
        line["role"] == "serve" and "was killed by SIGKILL" in line["message"] for line in lines_of(cluster, begin)
    )
    until(lambda: all(node["ready"] for node in cluster.nodes()["nodes"]), 60, "back")


def test_no_prompt_no_key_no_name_is_in_a_log(last_of, prompts, keys, folder, probe_of):
    """At the most talkative level, after requests of every kind. Runs last: it looks at what the others left, too."""
    cluster = last_of("pairs")
    cluster.settle()
    probe, prompt, text = probe_of(cluster), prompts.tokens(120), prompts.text(200)
    key = keys["acme"]
    salt = "a-salt-of-a-client"
    assert ask(cluster, "tokens", prompt, cache_salt=salt) == 200
    assert ask(cluster, "text", text) == 200
    assert ask(cluster, "wrong", text, temperature=-1) == 400
    assert cluster.http.post("/v1/completions", headers=credential(key[:-1]), json={}).status_code == 401
    assert (
        cluster.http.post("/v1/completions", headers=credential(key), content=f'{{"prompt": "{text}').status_code == 400
    )
    said = cluster.ask(text).text
    names = [*probe.names(prompt), *probe.names(prompt, salt=salt), *probe.names(list(text.encode()))]
    cluster.stop()
    log = cluster.log.read_text()
    file = tomllib.loads((Path(folder) / TENANTS_FILE).read_text())
    secrets = {
        "the prompt": [
            text,
            text[20:60],
            json.dumps(text)[20:60],
            str(prompt)[1:60],
            ", ".join(map(str, prompt[40:60])),
        ],
        "the answer": [said, said[5:25]],
        "the salt": [salt],
        "a key": [*keys.values(), *(key.rpartition("-")[2] for key in keys.values())],
        "the cluster's secret": [file["cluster_secret"]],
        "a tenant's salt": [tenant["tenant_salt"] for tenant in file["tenants"].values()],
        "a block's name": [shown for name in names for shown in (name.hex(), repr(name)[2:-1], str(list(name))[1:-1])],
    }
    assert "POST /v1/completions refused: 401" in log
    assert [what for what, shown in secrets.items() if any(one in log for one in shown)] == []
    assert all(line["role"] in ("serve", "store", "prefill", "decode", "router") for line in lines_of(cluster))
