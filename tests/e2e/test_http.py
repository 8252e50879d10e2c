"""What HTTP clients and operators meet beside the tokens."""

import re
import socket
from importlib.metadata import version
from typing import Any

import pytest
from e2e.cluster import Cluster
from prometheus_client.parser import text_string_to_metric_families

SOURCES = {"reused_gpu": ("reused", "gpu"), "reused_host": ("reused", "host"),
           "computed_prefill": ("computed", "prefill"), "computed_decode": ("computed", "decode")}  # fmt: skip


def metrics(cluster: Cluster) -> dict[tuple[str, frozenset], float]:
    families = text_string_to_metric_families(cluster.admin("/metrics").text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def tokens_by_source(cluster: Cluster) -> dict[str, float]:
    told = metrics(cluster)
    return {s: told.get(("kvferry_prompt_tokens_total", frozenset({("source", s)})), 0.0) for s in SOURCES}


def test_every_prompt_token_is_accounted_for_once(llama, prompts):
    """By each answer's account, and by the sums over all of them."""
    llama.settle()
    before, told_before = tokens_by_source(llama), metrics(llama)
    known, long = prompts.tokens(100), prompts.tokens(300)
    asked = [known, known, known[:50] + prompts.tokens(30), known + prompts.tokens(5), long, long, prompts.tokens(7)]
    replies = [llama.ask(prompt) for prompt in asked]
    llama.flush(prompts)
    replies += [llama.ask(prompt, stream=True) for prompt in (known, long, long[:160] + prompts.tokens(90))]
    sums = dict.fromkeys(SOURCES, 0)
    for reply in replies:
        account = reply.account
        by_source = {source: account[how][where] for source, (how, where) in SOURCES.items()}
        assert sum(by_source.values()) == reply.usage["prompt_tokens"] == len(reply.prompt_token_ids)
        assert reply.cached == account["reused"]["gpu"] + account["reused"]["host"]
        for source, count in by_source.items():
            sums[source] += count
    assert all(sums.values()), f"some source was never met: {sums}"
    flushed = 2 * 768
    sums["computed_prefill"] += flushed
    after = tokens_by_source(llama)
    assert {source: after[source] - before[source] for source in SOURCES} == sums
    ok = ("kvferry_requests_total", frozenset({("outcome", "ok")}))
    assert metrics(llama)[ok] - told_before.get(ok, 0) == len(replies) + 2


def test_refusals_are_counted(llama):
    """Also those that end before anything is computed."""
    told = metrics(llama)
    for model, prompt, code in (("nobody", [1], "model_not_found"), ("llama", [], "invalid_request")):
        key = ("kvferry_requests_total", frozenset({("outcome", code)}))
        body = {"model": model, "prompt": prompt, "max_tokens": 1}
        credentials = {"Authorization": f"Bearer {llama.key}"}
        assert llama.http.post("/v1/completions", json=body, headers=credentials).status_code in (400, 404)
        assert metrics(llama)[key] == told.get(key, 0) + 1


def test_a_stream_that_ends_in_an_error_counts_as_that(llama, prompts):
    timeout, ok = (("kvferry_requests_total", frozenset({("outcome", outcome)})) for outcome in ("timeout", "ok"))
    for seconds in (0.1, 0.2, 0.4, 0.8, 1.6):  # until it is in mid-stream
        told = metrics(llama)
        body = {"model": "llama", "prompt": prompts.tokens(20), "max_tokens": 900, "ignore_eos": True, "stream": True}
        reply = llama.post("/v1/completions", {**body, "timeout": seconds})
        if reply.status == 200 and reply.text:
            break
    assert reply.error["code"] == "timeout", "it should have been in mid-stream"
    assert metrics(llama)[timeout] == told.get(timeout, 0) + 1
    assert metrics(llama).get(ok, 0) == told.get(ok, 0)


def test_metrics_of_nodes_and_store(llama):
    told = metrics(llama)
    nodes = {node["address"]: node for node in llama.nodes()["nodes"]}
    for address, node in nodes.items():
        labels = frozenset({("role", node["role"]), ("address", address)})
        assert told["kvferry_node_up", labels] == 1
        assert told["kvferry_node_total_blocks", labels] == node["total_blocks"]
    assert told["kvferry_store_slots", frozenset()] == llama.store()["slots"]
    assert told["kvferry_ttft_seconds_count", frozenset()] >= 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"max_token": 5}, "max_token"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": [1, 2, 300]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [1] * 1024}, "prompt"),
        ({"max_tokens": 1024}, "max_tokens"),
        ({"seed": 1.5}, "seed"),
        ({"cache_salt": 5}, "cache_salt"),
    ],
)
def test_a_refusal_names_its_field(fields: dict[str, Any], param, llama, prompts):
    reply = llama.post("/v1/completions", llama.body(prompts.tokens(10)) | fields)
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error"
    assert param in reply.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/metrics", 404),
        ("GET", "/nodes", 404),
        ("DELETE", "/v1/models/llama", 405),
        ("PUT", "/health", 405),
        ("POST", "/", 404),
    ],
)
def test_other_routes(method, path, status, llama):
    answer = llama.http.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == (
        "invalid_request_error", "not_found" if status == 404 else "method_not_allowed")  # fmt: skip
    assert path in error["message"]
    assert answer.headers["X-Request-Id"]
    assert ("Allow" in answer.headers) == (status == 405)


def test_health_and_models(llama):
    assert llama.http.get("/health").json() == {"status": "ok"}
    assert llama.http.get("/ready").json() == {"status": "ready"}
    models = llama.http.get("/v1/models", headers={"Authorization": f"Bearer {llama.key}"}).json()
    assert models["object"] == "list"
    assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("llama", 1024)]
    assert llama.http.get("/version").json() == {"version": version("kvferry")}


@pytest.mark.parametrize("name", ["nobody", "nobody/at-all", "llama/"])
def test_one_model(name, llama):
    key = {"Authorization": f"Bearer {llama.key}"}
    one = llama.http.get("/v1/models/llama", headers=key)
    assert one.json() == llama.http.get("/v1/models", headers=key).json()["data"][0]
    assert llama.http.get("/v1/models/llama").status_code == 401
    answer = llama.http.get(f"/v1/models/{name}", headers=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert name in answer.json()["error"]["message"]


def test_a_request_id_is_kept(llama, prompts):
    headers = {"Authorization": f"Bearer {llama.key}", "X-Request-Id": "mine-1"}
    answer = llama.http.post("/v1/completions", json=llama.body(prompts.tokens(5)), headers=headers)
    assert answer.headers["X-Request-Id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"


@pytest.mark.parametrize("given", ["a" * 65, "with space", "h\u00e9", "semi;colon", ""])
def test_a_request_id_that_could_do_harm_is_replaced(given, llama):
    answer = llama.http.get("/health", headers=[(b"X-Request-Id", given.encode())])
    assert answer.headers["X-Request-Id"] != given
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])
    refused = llama.http.post("/v1/completions", headers={"X-Request-Id": "a" * 64})
    assert (refused.status_code, refused.headers["X-Request-Id"]) == (401, "a" * 64)


def test_headers_make_no_tenant(llama, keys, prompts):
    """Who asks is told by the key alone."""
    prompt = prompts.tokens(40)
    assert llama.ask(prompt).cached == 0
    claims = {"X-Tenant": "acme", "X-Tenant-Id": "acme", "X-Forwarded-User": "acme", "OpenAI-Organization": "acme"}
    key = {"Authorization": f"Bearer {keys['beta']}"}
    answer = llama.http.post("/v1/completions", json=llama.body(prompt), headers=claims | key)
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert llama.ask(prompt).cached == 32


def test_a_text_prompt(llama, oracle, prompts):
    """A text is tokenised as the model's tokenizer does, with the special tokens that it adds."""
    text = prompts.text(50)
    reply = llama.ask(text)
    assert reply.prompt_token_ids == [256, *text.encode()]
    assert oracle.refuses(reply.prompt_token_ids, reply.token_ids) == ""
    assert reply.text == bytes(reply.token_ids).decode()


def test_neither_listener_is_reachable_from_outside(llama):
    router = llama.of_role("router")
    listening = {c.laddr.ip for c in router.net_connections("tcp") if c.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    assert not [c for role in ("store", "prefill", "decode") for c in llama.of_role(role).net_connections("tcp")]


def test_a_broken_body_harms_nobody(llama, prompts):
    headers = {"Authorization": f"Bearer {llama.key}", "Content-Type": "application/json"}
    for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"prompt":' + b"[" * 5000):
        answer = llama.http.post("/v1/completions", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    with socket.create_connection(("127.0.0.1", llama.port)) as connection:  # a body that never comes
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
    assert len(llama.ask(prompts.tokens(20)).token_ids) == 24
