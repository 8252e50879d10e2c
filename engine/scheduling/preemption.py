"""Who is pushed out when places or blocks run short.

The tenant that holds the most for its weight loses its last sequence in line (the longest queue drops). To let another
in, it only loses what leaves it no worse off than the newcomer's tenant: so two never push each other out in turn.
"""

from collections.abc import Callable, Collection, Iterable

from kvferry.engine.scheduling.fairness import Tenant, Tenants
from kvferry.engine.sequence import Sequence, Status

Held = Callable[[str, Collection[Sequence]], int]  # by the tenant of this name, when some of its sequences have gone


def places_of(seqs: Iterable[Sequence]) -> int:
    """How many sequences they are, once those that will fork have done so."""
    return sum(seq.params.n for seq in seqs)


def last_in_line(seqs: Iterable[Sequence]) -> Sequence:
    """Whom it costs least to push out: one that is half restored before one that runs, then the last one in rank."""
    return max(seqs, key=lambda seq: (seq.status is Status.RESTORING, seq.rank))


def victim_for_growth(seq: Sequence, tenants: Tenants, blocks_held: Held) -> Sequence:
    """Who gives up its blocks for a running sequence that needs one more; it may be itself."""
    able = [tenant for tenant in tenants.busy if tenant.active]
    loser = max(able, key=lambda tenant: blocks_held(tenant.name, ()) / tenant.weight)
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
    blocks_held: Held,
) -> list[Sequence] | None:
    """Who makes room for a waiting sequence that lacks so many places and blocks; None if it has to wait.

    `freed(victim)` is how many blocks become free for it with that one. Those in flight stay.
    """

    def places_held(name: str, gone: Collection[Sequence]) -> int:
        return places_of(tenants[name].active.values()) - places_of(gone)

    own = tenants[seq.tenant]
    able = {tenant: [s for s in tenant.active.values() if not in_flight(s)] for tenant in tenants.busy}
    gone: dict[Tenant, list[Sequence]] = {tenant: [] for tenant in able if tenant is not own}
    victims: list[Sequence] = []
    while places > 0 or blocks > 0:
        held, more = (places_held, seq.params.n) if places > 0 else (blocks_held, seq.blocks_needed)
        losers = [tenant for tenant in gone if able[tenant]]
        if not losers:
            return None
        loser = max(losers, key=lambda tenant: held(tenant.name, gone[tenant]) / tenant.weight)
        victim = last_in_line(able[loser])
        able[loser].remove(victim)
        gone[loser].append(victim)
        if held(loser.name, gone[loser]) / loser.weight < (held(own.name, ()) + more) / own.weight:
            return None
        victims.append(victim)
        places -= victim.params.n
        blocks -= freed(victim)
    return victims
