"""Served tokens against the reference, in every state that a prompt's KV can be in."""

import pytest
from checkpoints import ARCHITECTURES
from e2e.cases import CASES, Scene
from e2e.conftest import TENANTS_FILE
from e2e.probe import Probe


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_are_those_of_the_reference(arch, case, shared, oracles, prompts, folder):
    cluster = shared(arch)
    scene = Scene(cluster, prompts, Probe(cluster, folder / TENANTS_FILE))
    CASES[case](scene)
    assert scene.replies
    for reply in scene.replies:
        assert oracles[arch].refuses(reply.prompt_token_ids, reply.token_ids) == ""
    cluster.settle()
