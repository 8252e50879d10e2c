"""Served tokens against the reference, in every state that a prompt's KV can be in."""

import pytest
from checkpoints import ARCHITECTURES
from e2e.cluster import MAX_TOKENS, Prompts, Reply
from oracle import Oracle

BLOCK = 16
LONG = 300  # tokens: five chunks of 64

every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)


def check(oracle: Oracle, prompt: list[int], reply: Reply) -> Reply:
    assert oracle.answer(prompt, len(reply.token_ids)).difference(reply.token_ids) == ""
    assert len(reply.token_ids) == MAX_TOKENS
    return reply


def cap(length: int) -> int:
    """Tokens of a prompt that may be reused."""
    return (length - 1) // BLOCK * BLOCK


@every_arch
def test_cold_then_warm(arch, shared, oracles, prompts: Prompts):
    cluster, oracle, prompt = shared(arch), oracles[arch], prompts.tokens(100)
    cold = check(oracle, prompt, cluster.ask(prompt))
    assert cold.cached == 0
    assert cold.account["computed"] == {"prefill": 100, "decode": 0}
    assert cold.account["transferred"] == cap(100)
    warm = check(oracle, prompt, cluster.ask(prompt))
    assert warm.cached == cap(100)
    assert warm.computed == 100 - cap(100)
