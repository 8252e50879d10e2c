"""Where a request runs: which decode node continues it, and whether a prefill node fills it first."""

from dataclasses import dataclass

import xxhash

from kvferry.common.hashing import BlockName
from kvferry.router.nodes import Node


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` None: decode computes the uncached tokens itself. The other numbers are what the choice was made
    from: tokens that the store was seen to hold, tokens left to compute, seconds each way is expected to take."""

    decode: Node
    prefill: Node | None
    cached_tokens: int
    uncached_tokens: int
    prefill_s: float
    decode_s: float


def place(
    decode: Node, partners: list[Node], names: list[BlockName], prompt_tokens: int, cached_tokens: int, local_limit: int
) -> Placement:
    """Choose for a prompt of which the store holds `cached_tokens`.

    Up to `local_limit` uncached tokens are computed on decode: such a chunk delays the streams that run there by about
    one step, and a hand-over costs more. Anything longer goes to the prefill node that is expected to be done first.
    """
    uncached = prompt_tokens - cached_tokens
    prefill = fastest(partners, names, uncached) if uncached > local_limit else None
    return Placement(
        decode=decode,
        prefill=prefill,
        cached_tokens=cached_tokens,
        uncached_tokens=uncached,
        prefill_s=expected_s(prefill, uncached) if prefill else 0.0,
        decode_s=expected_s(decode, uncached),
    )


def least_loaded(nodes: list[Node]) -> list[Node]:
    """Decode nodes, the best first: fewest streams, then most free blocks."""

    def load(node: Node) -> tuple[int, int]:
        return (max(node.streams, node.status.running + node.status.waiting), -node.status.free_blocks)

    return sorted((node for node in nodes if node.ready), key=load)


def expected_s(node: Node, tokens: int) -> float:
    """Seconds until `node` would have computed `tokens` more, at its measured rate; 0 while it has none."""
    rate = node.status.prefill_tokens_per_s
    return (node.status.waiting_tokens + tokens) / rate if rate else 0.0


def fastest(nodes: list[Node], names: list[BlockName], tokens: int) -> Node | None:
    """The prefill node with the least work before it; among equals always the same one for the same prefix, so that
    its page pool is used again (rendezvous hashing, Thaler and Ravishankar 1998)."""

    def cost(node: Node) -> tuple[int, float, int]:
        prefix = names[0] if names else b""
        return (node.streams, expected_s(node, tokens), xxhash.xxh3_64_intdigest(node.address.encode() + prefix))

    return min(nodes, key=cost, default=None)
