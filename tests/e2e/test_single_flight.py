"""A prefix that several ask for at once is computed once."""

from functools import partial

import pytest
from e2e.cluster import Cluster


@pytest.mark.parametrize("prefill", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_identical_prompts_at_once(prefill, shared, own, oracle, prompts):
    """On one prefill worker, where both fills share a connection, and on two, where they do not."""
    if prefill == 1:
        cluster = shared("slow")
    else:
        cluster = own("--prefill=2", "--prefill-arg=--failpoint=publish.copied=sleep:0.05", tenants=False)
    cluster.settle()
    pulled = pulled_by_prefill(cluster)
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
    some = pulled_by_prefill(cluster) > pulled
    assert some == (prefill == 2), "who waits on another worker pulls; on the same one the page pool has it"


def pulled_by_prefill(cluster: Cluster) -> int:
    return sum(int(node["pulled_bytes"]) for node in cluster.nodes()["nodes"] if node["role"] == "prefill")
