"""Who is pushed out when places or blocks run short.

The tenant that holds the most for its weight loses its last sequence in line (the longest queue drops). To let another
in, it only loses what leaves it no worse off than the newcomer's tenant: so two never push each other out in turn.
"""

from collections.abc import Callable, Iterable

from kvferry.engine.scheduling.fairness import Tenant, Tenants
from kvferry.engine.sequence import Sequence, Status

Measure = Callable[[Iterable[Sequence]], int]


def places_of(seqs: Iterable[Sequence]) -> int:
    """How many sequences they are, once those that will fork have done so."""
    return sum(seq.params.n for seq in seqs)


def blocks_of(seqs: Iterable[Sequence]) -> int:
    """How many blocks they hold. One that several share counts for who had it first."""
    return sum(len(seq.block_table) - seq.borrowed for seq in seqs)


def last_in_line(seqs: Iterable[Sequence]) -> Sequence:
    """Whom it costs least to push out: one that is half restored before one that runs, then the last one in rank."""
    return max(seqs, key=lambda seq: (seq.status is Status.RESTORING, seq.rank))


def victim_for_growth(seq: Sequence, tenants: Tenants) -> Sequence:
    """Who gives up its blocks for a running sequence that needs one more; it may be itself."""
    loser = max(tenants.busy, key=lambda tenant: blocks_of(tenant.active.values()) / tenant.weight)
    if loser is not tenants[seq.tenant]:
        return last_in_line(loser.active.values())
    behind = [other for other in loser.active.values() if other.rank > seq.rank]
    return last_in_line(behind) if behind else seq


def victims_for_admission(
    seq: Sequence,
    tenants: Tenants,
    places: int,
    blocks: int,
    freed: Callable[[Sequence], int],
    in_flight: Callable[[Sequence], bool],
) -> list[Sequence] | None:
    """Who makes room for a waiting sequence that lacks so many places and blocks; None if it has to wait.

    `freed(victim)` is how many blocks become free for it with that one. Those in flight stay.
    """
    own = tenants[seq.tenant]
    left = {tenant: list(tenant.active.values()) for tenant in tenants.busy if tenant is not own}
    victims: list[Sequence] = []
    while places > 0 or blocks > 0:
        held, more = (places_of, seq.params.n) if places > 0 else (blocks_of, seq.blocks_needed)
        loser = _largest(left, held, in_flight)
        if loser is None:
            return None
        victim = last_in_line(other for other in left[loser] if not in_flight(other))
        left[loser].remove(victim)
        if held(left[loser]) / loser.weight < (held(own.active.values()) + more) / own.weight:
            return None
        victims.append(victim)
        places -= victim.params.n
        blocks -= freed(victim)
    return victims


def _largest(left: dict[Tenant, list[Sequence]], held: Measure, in_flight: Callable[[Sequence], bool]) -> Tenant | None:
    """Who holds the most for its weight and has a sequence that could go."""
    able = [tenant for tenant, seqs in left.items() if not all(map(in_flight, seqs))]
    return max(able, key=lambda tenant: held(left[tenant]) / tenant.weight, default=None)
