"""The states that a prompt's KV can be in when a request comes. Each case asks a cluster and says where the prompt's
tokens should have come from; whether the answers are right, its caller decides."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from e2e.cluster import BLOCK, Cluster, Prompts, Reply
from e2e.probe import Probe

EIGHT_LENGTHS = (5, 17, 33, 64, 90, 150, 222, 400)


@dataclass
class Scene:
    """A cluster, prompts nobody has sent before, and the answers so far."""

    cluster: Cluster
    prompts: Prompts
    probe: Probe
    replies: list[Reply] = field(default_factory=list)

    def ask(self, prompt: list[int], **fields) -> Reply:
        reply = self.cluster.ask(prompt, **fields)
        assert reply.prompt_token_ids == prompt
        self.replies.append(reply)
        return reply


def reusable(length: int) -> int:
    """Tokens of a prompt that may be reused: one is left to compute."""
    return (length - 1) // BLOCK * BLOCK


def cold(scene: Scene) -> None:
    reply = scene.ask(scene.prompts.tokens(100))
    assert reply.cached == 0
    assert reply.account["computed"] == {"prefill": 100, "decode": 0}
    assert (reply.account["transferred"], reply.account["recomputed"]) == (96, 4)


def warm(scene: Scene) -> None:
    """Decode still has the blocks in its page pool."""
    prompt = scene.prompts.tokens(100)
    assert scene.ask(prompt).cached == 0
    reply = scene.ask(prompt)
    assert reply.account["reused"] == {"gpu": 96, "host": 0}
    assert reply.account["computed"] == {"prefill": 0, "decode": 4}


def warm_from_store(scene: Scene) -> None:
    prompt = scene.prompts.tokens(100)
    assert scene.ask(prompt).cached == 0
    scene.cluster.flush(scene.prompts)
    reply = scene.ask(prompt)
    assert reply.account["reused"] == {"gpu": 0, "host": 96}


def half_warm(scene: Scene) -> None:
    """The first half is known, to both workers and to the store."""
    prompt = scene.prompts.tokens(160)
    assert scene.ask(prompt).cached == 0
    reply = scene.ask(prompt[:80] + scene.prompts.tokens(80))
    assert reply.account["reused"] == {"gpu": 80, "host": 0}
    assert reply.account["computed"] == {"prefill": 80, "decode": 0}


def half_warm_from_store(scene: Scene) -> None:
    """Prefill pulls the first half and publishes the second; decode pulls both."""
    prompt = scene.prompts.tokens(160)
    assert scene.ask(prompt).cached == 0
    scene.cluster.flush(scene.prompts)
    reply = scene.ask(prompt[:80] + scene.prompts.tokens(80))
    assert reply.account["reused"] == {"gpu": 0, "host": 80}
    assert reply.account["transferred"] == 80, "what nobody computed for this request is not transferred"


def chunked(scene: Scene) -> None:
    """Five chunks of at most 64 tokens."""
    reply = scene.ask(scene.prompts.tokens(300))
    assert reply.account["computed"] == {"prefill": 300, "decode": 0}


def whole_blocks(scene: Scene, length: int) -> None:
    prompt = scene.prompts.tokens(length)
    assert scene.ask(prompt).cached == 0
    assert scene.ask(prompt).cached == reusable(length)


def middle_gone(scene: Scene) -> None:
    """Block 4 of 9 has left the store, and everything the page pools: it alone is computed again."""
    prompt = scene.prompts.tokens(160)
    scene.ask(prompt)
    scene.cluster.flush(scene.prompts)
    names = scene.probe.names(prompt)
    scene.probe.remove(names[4])
    assert scene.probe.present(names).count(False) == 1
    reply = scene.ask(prompt)
    assert reply.account["reused"] == {"gpu": 0, "host": 128}
    assert reply.computed == 32
    assert all(scene.probe.present(names)), "the block that was gone was not published again"


def eight_at_once(scene: Scene) -> None:
    prompts = [scene.prompts.tokens(length) for length in EIGHT_LENGTHS]
    scene.cluster.together([partial(scene.ask, prompt) for prompt in prompts])
    assert sorted(len(reply.prompt_token_ids) for reply in scene.replies) == list(EIGHT_LENGTHS)


def second_turn(scene: Scene, added: int) -> None:
    """The second turn's prompt begins with the first one's and its answer, whose blocks decode has published."""
    first = [{"role": "user", "content": scene.prompts.text(60)}]
    reply = scene.cluster.chat(first, max_tokens=40)
    said = {"role": "assistant", "content": reply.text}
    turn = scene.cluster.chat([*first, said, {"role": "user", "content": scene.prompts.text(added)}])
    before = reply.prompt_token_ids + reply.token_ids
    assert turn.prompt_token_ids[: len(before)] == before
    assert turn.cached == (len(before) - 1) // BLOCK * BLOCK  # the last token's KV was never computed
    assert turn.cached > reusable(len(reply.prompt_token_ids)) + BLOCK
    scene.replies += [reply, turn]


CASES: dict[str, Callable[[Scene], None]] = {
    "cold": cold,
    "warm": warm,
    "warm_from_store": warm_from_store,
    "half_warm": half_warm,
    "half_warm_from_store": half_warm_from_store,
    "chunked": chunked,
    "k_blocks_less_one": partial(whole_blocks, length=63),
    "k_blocks": partial(whole_blocks, length=64),
    "k_blocks_and_one": partial(whole_blocks, length=65),
    "middle_gone": middle_gone,
    "eight_at_once": eight_at_once,
    "second_turn": partial(second_turn, added=4),
    "second_turn_through_prefill": partial(second_turn, added=60),
}
