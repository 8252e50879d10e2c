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
