"""bench/soak.py: what a soak came to, in figures and in words."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from soak_ground import BLOCK_BYTES
from soak_processes import Node, Part, Worker

# Of memory and descriptors, from the first rest to the last. What may still come to be in a node by then is bounded:
# the names of 65536 blocks that are gone and of as many that were announced, connections to other nodes and to Redis.
GROWTH_MIB, GROWTH_FDS = 32, 16
MEANINGS = {
    "errors": "must be 0",
    "published": "blocks that workers published and nobody had",
    "pulled": "blocks that workers pulled, verified and compared",
    "dropped": "blocks that found no room to be published",
    "brought": "blocks that nodes brought from one another",
    "evicted": "blocks that made room",
    "hit_share": "blocks pulled of those asked for",
    "gb_per_s": "published and pulled, of all workers together, while there was load",
    "slowest_s": "the longest that one piece of work took, waiting for others included",
    "rests": "times that nothing was held and the indexes were whole",
    "faults": "processes killed or ended, and Redis flushed",
    "node_rss_growth_mib": f"from the first rest to the last, of the node that grew most; {GROWTH_MIB} at most",
    "node_fds_growth": f"the same; {GROWTH_FDS} at most: nodes keep some connections to one another",
    "client_rss_growth_mib": f"of the worker that grew most; {GROWTH_MIB} at most",
    "client_fds_growth": f"the same; {GROWTH_FDS} at most",
}


class Done(NamedTuple):
    """`counts`: by the workers, and of the nodes' numbers. `loaded_s`: how long there was load."""

    counts: Counter[str]
    loaded_s: float
    rests: int
    faults: Counter[str]
    errors: int


def figures_of(done: Done, nodes: Sequence[Node], workers: Sequence[Worker]) -> dict[str, float]:
    counts = done.counts
    moved = (counts["published"] + counts["pulled"]) * BLOCK_BYTES / 1e9
    figures: dict[str, float] = {
        "errors": done.errors,
        "published": counts["published"],
        "pulled": counts["pulled"],
        "dropped": counts["dropped"],
        "brought": counts["brought"],
        "evicted": counts["evicted"],
        "hit_share": counts["pulled"] / max(1, counts["asked"]),
        "gb_per_s": moved / done.loaded_s,
        "slowest_s": max(worker.slowest_s for worker in workers),
        "rests": done.rests,
        "faults": sum(done.faults.values()),
    }
    for kind, parts in (("node", nodes), ("client", workers)):
        figures[f"{kind}_rss_growth_mib"] = max(part.growth.rss for part in parts) / 2**20
        figures[f"{kind}_fds_growth"] = max(part.growth.fds for part in parts)
    return figures


def grown(parts: Sequence[Part]) -> list[str]:
    """Who has grown by more than the bounds."""
    return [
        f"{part.name} has grown by {part.growth.rss / 2**20:.0f} MiB and {part.growth.fds} descriptors"
        for part in parts
        if part.growth.rss > GROWTH_MIB * 2**20 or part.growth.fds > GROWTH_FDS
    ]


def show(figures: dict[str, float], parts: Sequence[Part], faults: Counter[str]) -> None:
    sizes = Table("process", "starts", "MiB at first", "at the end", "descriptors at first", "at the end")
    for part in (part for part in parts if part.sizes):
        first, last = part.sizes[0], part.sizes[-1]
        memory = [f"{size.rss / 2**20:.0f}" for size in (first, last)] + [str(size.fds) for size in (first, last)]
        sizes.add_row(part.name, str(part.starts), *memory)
    table = Table("figure", "value", "what")
    for name, what in MEANINGS.items():
        table.add_row(name, f"{figures[name]:.3g}" if figures[name] < 1000 else f"{figures[name]:.0f}", what)
    console = Console(width=120)
    for one in (sizes, table):
        console.print(one)
    console.print(", ".join(f"{what}: {times}" for what, times in faults.items()))
