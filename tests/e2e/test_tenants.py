"""What one tenant has sent is no hit for another; a cache_salt narrows within a tenant."""

import pytest


def test_another_tenant_has_no_hits(llama, oracle, prompts, keys):
    prompt = prompts.tokens(120)
    first = llama.ask(prompt, key=keys["acme"])
    other = llama.ask(prompt, key=keys["beta"])
    assert (first.cached, other.cached) == (0, 0)
    assert other.account["reused"] == {"gpu": 0, "host": 0}
    again = {tenant: llama.ask(prompt, key=keys[tenant]) for tenant in ("acme", "beta")}
    assert [reply.cached for reply in again.values()] == [112, 112]
    for reply in (first, other, *again.values()):
        assert oracle.refuses(prompt, reply.token_ids) == ""


def test_another_salt_has_no_hits(llama, oracle, prompts):
    prompt = prompts.tokens(120)
    cached = [llama.ask(prompt, cache_salt=salt).cached for salt in ("x", "y", "", "x", "y", "")]
    assert cached == [0, 0, 0, 112, 112, 112]


def test_tenant_and_salt_do_not_run_together(llama, prompts, keys):
    prompt = prompts.tokens(120)
    assert llama.ask(prompt, key=keys["a"], cache_salt="bX").cached == 0
    assert llama.ask(prompt, key=keys["ab"], cache_salt="X").cached == 0
    assert llama.ask(prompt, key=keys["a"], cache_salt="bX").cached == 112


def test_hits_of_one_tenant_are_not_seen_by_the_store_as_anothers(llama, prompts, keys):
    """Each tenant's blocks are under names of its own: both copies are there."""
    prompt = prompts.tokens(96)
    before = llama.store()["committed"]
    for tenant in ("acme", "beta"):
        llama.ask(prompt, key=keys[tenant])
    llama.settle()
    after = llama.store()
    generated = (96 + 24 - 1) // 16  # whole blocks whose KV was computed
    assert after["committed"] - before == 2 * generated
    assert len(after["committed_by_tenant"]) >= 2
    assert not {"acme", "beta"} & set(after["committed_by_tenant"])


@pytest.mark.parametrize("key", ["", "nonsense", "kvf-000000000000-" + 64 * "0", "wrong secret"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/models"])
def test_without_a_valid_key(key, path, llama, keys):
    if key == "wrong secret":
        key = keys["acme"][:-64] + keys["beta"][-64:]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = llama.http.get(path, headers=headers) if path == "/v1/models" else llama.http.post(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
    assert "API key" in error["message"]
