"""Sampling is a pure function: at temperature 1 a seed gives the same tokens wherever their KV came from."""

from functools import partial

import pytest
from checkpoints import ARCHITECTURES


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_seed_gives_the_same_tokens(arch, shared, prompts):
    cluster, prompt = shared(arch), prompts.tokens(150)
    ask = partial(cluster.ask, prompt, temperature=1, seed=20261120, max_tokens=48)
    cold = ask(cache_salt="one")
    assert cold.cached == 0
    replies = {"warm": ask(cache_salt="one"), "streamed": ask(cache_salt="one", stream=True)}
    assert replies["warm"].cached == replies["streamed"].cached == 144
    cluster.flush(prompts)
    replies["from the store"] = ask(cache_salt="one")
    assert replies["from the store"].account["reused"] == {"gpu": 0, "host": 144}
    replies["computed again"] = ask(cache_salt="two")
    assert replies["computed again"].cached == 0
    others = [partial(cluster.ask, prompts.tokens(n), temperature=1, max_tokens=48) for n in (20, 70, 130, 200, 333)]
    replies["among others"], *_ = cluster.together([partial(ask, cache_salt="three"), *others])
    replies["among others, reused"], *_ = cluster.together([partial(ask, cache_salt="three", stream=True), *others])
    for how, reply in replies.items():
        assert reply.token_ids == cold.token_ids, how
    another = cluster.ask(prompt, temperature=1, seed=20261121, max_tokens=48)
    assert another.token_ids != cold.token_ids
    greedy = cluster.ask(prompt, max_tokens=48)
    assert greedy.token_ids != cold.token_ids
    assert (another.cached, greedy.cached) == (0, 144)


def test_what_looks_back_looks_back_across_the_handover(llama, prompts):
    """Penalties and bad words count tokens that another process has chosen, and a prompt whose KV was pulled."""
    prompt = prompts.tokens(150)
    plain = llama.ask(prompt, temperature=1, seed=7, max_tokens=48)
    often = max(set(plain.token_ids), key=plain.token_ids.count)
    fields = {
        "temperature": 1, "seed": 7, "max_tokens": 48, "frequency_penalty": 1.5, "presence_penalty": 0.5,
        "repetition_penalty": 1.3, "min_p": 0.01, "logit_bias": {str(often): -5},
        "stop_token_ids": [plain.token_ids[-1]],
    }  # fmt: skip
    cold = llama.ask(prompt, cache_salt="one", **fields)
    assert cold.cached == 0
    assert cold.account["computed"]["prefill"] == 150, "nothing was handed over"
    assert cold.token_ids != plain.token_ids[: len(cold.token_ids)]
    local = llama.ask(prompt, cache_salt="one", **fields)
    assert local.account["computed"]["prefill"] == 0
    llama.flush(prompts)
    pulled = llama.ask(prompt, cache_salt="one", stream=True, **fields)
    assert pulled.account["reused"]["host"] == 144
    assert cold.token_ids == local.token_ids == pulled.token_ids


def test_a_token_that_is_wanted_enough_is_all_there_is(llama, prompts):
    prompt = prompts.tokens(40)
    reply = llama.ask(prompt, logit_bias={"65": 100, "66": 50}, max_tokens=10)
    assert reply.token_ids == [65] * 10
    reply = llama.ask(prompt, logit_bias={"65": 100, "66": 50}, bad_words=["A"], max_tokens=10)
    assert reply.token_ids == [66] * 10
