"""Where a request runs: which decode node continues it, and whether a prefill node fills it first."""

from dataclasses import dataclass

import xxhash

from kvferry.common.hashing import BlockName
from kvferry.router.nodes import Node

AFFINITY_S = 0.05  # so much longer a wait is worth a page pool that knows the prefix


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` None: decode computes the uncached tokens itself. `cached_tokens`: what the store was seen to hold."""

    decode: Node
    prefill: Node | None
    cached_tokens: int


def place(
    decode: Node, partners: list[Node], names: list[BlockName], prompt_tokens: int, cached_tokens: int, local_limit: int
) -> Placement:
    """Choose for a prompt of which the store holds `cached_tokens`.

    Up to `local_limit` uncached tokens are computed on decode: such a chunk delays the streams that run there by about
    one step, and a hand-over costs more. Anything longer goes to the prefill node that is expected to be done first.
    """
    uncached = prompt_tokens - cached_tokens
    prefill = best_prefill(partners, names, uncached) if uncached > local_limit else None
    return Placement(decode, prefill, cached_tokens)


def least_loaded(nodes: list[Node]) -> list[Node]:
    """Decode nodes, the best first: fewest streams, then most free blocks."""

    def load(node: Node) -> tuple[int, int]:
        return (max(node.streams, node.status.running + node.status.waiting), -node.status.free_blocks)

    return sorted((node for node in nodes if node.ready), key=load)


def wait_s(node: Node, tokens: int) -> float:
    """Seconds of work before a fill of about `tokens` on `node`: what it said was waiting, or what this router has sent
    there since, at the node's measured rate (a second a fill while it has none)."""
    status = node.status
    if status is None or not status.prefill_tokens_per_s:
        return float(node.streams)
    return max(status.waiting_tokens, node.streams * tokens) / status.prefill_tokens_per_s


def best_prefill(nodes: list[Node], names: list[BlockName], tokens: int) -> Node | None:
    """The node that this prefix always goes to, so that its page pool is used again (rendezvous hashing, Thaler and
    Ravishankar 1998), unless another is clearly less busy."""
    if not nodes:
        return None
    prefix = names[0] if names else b""
    home = min(nodes, key=lambda node: xxhash.xxh3_64_intdigest(node.address.encode() + prefix))
    idlest = min(nodes, key=lambda node: wait_s(node, tokens))
    return home if wait_s(home, tokens) <= wait_s(idlest, tokens) + AFFINITY_S else idlest
