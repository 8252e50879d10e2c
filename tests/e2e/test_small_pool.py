"""Decode with room for a fraction of what it is asked: it preempts, pulls or computes again, and is right."""

from functools import partial

import pytest
from checkpoints import ARCHITECTURES
from e2e.cluster import BLOCK, Cluster

POOL = 12  # blocks


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch == "gpt2" else pytest.mark.long) for arch in ARCHITECTURES]
)
def test_preempted_and_right(arch, own, oracles, prompts):
    cluster: Cluster = own(f"--decode-arg=--num-gpu-blocks-override={POOL}", arch=arch)
    asked = [prompts.tokens(length) for length in (40, 20, 45, 30, 50, 40)]
    for number in range(2):  # once cold, once with the store to pull from
        before = int(cluster.node("decode")["preemptions"])
        replies = cluster.together([partial(cluster.ask, prompt, max_tokens=70) for prompt in asked])
        for prompt, reply in zip(asked, replies, strict=True):
            assert len(reply.token_ids) == 70
            assert oracles[arch].refuses(prompt, reply.token_ids) == ""
            assert reply.account["attempts"] == 1
            assert number or not reply.cached
        cluster.settle()
        assert int(cluster.node("decode")["preemptions"]) > before
        assert cluster.node("decode")["free_blocks"] == POOL

    # Each needs more than half of the pool: one waits until the other's blocks are free, and no longer.
    halves = [prompts.tokens(7 * BLOCK) for _ in range(3)]
    for prompt, reply in zip(halves, cluster.together([partial(cluster.ask, p) for p in halves]), strict=True):
        assert oracles[arch].refuses(prompt, reply.token_ids) == ""

    for length, max_tokens in ((POOL * BLOCK, 1), (100, POOL * BLOCK - 100 + 1), (500, 10)):
        reply = cluster.post("/v1/completions", cluster.body(prompts.tokens(length), max_tokens=max_tokens))
        assert reply.status == 400, (length, max_tokens, reply.body)
        assert reply.error["type"] == "invalid_request_error"
        assert str(POOL * BLOCK) in reply.error["message"]
    most = prompts.tokens(100)
    reply = cluster.ask(most, max_tokens=POOL * BLOCK - 100)
    assert oracles[arch].refuses(most, reply.token_ids) == ""
    cluster.settle()
    cluster.stop()
