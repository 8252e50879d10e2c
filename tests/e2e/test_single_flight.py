"""A prefix that several ask for at once is computed once."""

from functools import partial

import pytest


@pytest.mark.parametrize("prefill", [1, 2])
def test_two_identical_prompts_at_once(prefill, own, oracle, prompts):
    """On one prefill worker, where both fills share a connection, and on two, where they do not."""
    cluster = own(f"--prefill={prefill}", "--prefill-arg=--failpoint=publish.copied=sleep:0.05")
    for length in (300, 800):
        prompt = prompts.tokens(length)
        cluster.settle()
        before = cluster.store()
        replies = cluster.together([partial(cluster.ask, prompt)] * 2)
        cluster.settle()
        after = cluster.store()
        tail = length - (length - 1) // 16 * 16
        for reply in replies:
            assert oracle.refuses(prompt, reply.token_ids) == ""
        assert sorted(reply.computed for reply in replies) == [tail, length]
        assert sorted(reply.cached for reply in replies) == [0, length - tail]
        blocks = (length + len(replies[0].token_ids) - 1) // 16  # with those that decode generated, once as well
        assert after["published"] - before["published"] == blocks
    pulled = [int(node["pulled_bytes"]) > 0 for node in cluster.nodes()["nodes"] if node["role"] == "prefill"]
    assert any(pulled) == (prefill == 2), "who waits on another worker pulls; on the same one the page pool has it"
    cluster.stop()
