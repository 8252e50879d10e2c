"""Served tokens against the reference, in every state that a prompt's KV can be in."""

import pytest
from checkpoints import ARCHITECTURES
from e2e.cases import CASES, Scene


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_are_those_of_the_reference(arch, case, shared, oracles, prompts, probe_of):
    cluster = shared(arch)
    scene = Scene(cluster, prompts, probe_of(cluster))
    CASES[case](scene)
    assert scene.replies
    for reply in scene.replies:
        assert oracles[arch].refuses(reply.prompt_token_ids, reply.token_ids) == ""
    cluster.settle()
