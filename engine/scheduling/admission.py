"""Whom an engine takes in: never what can never run, and no tenant's line so long that another's finds no end to it."""

from kvferry.common.errors import InvalidRequest, Overloaded
from kvferry.engine.scheduling.fairness import Tenants
from kvferry.engine.scheduling.preemption import Held, places_of
from kvferry.engine.sequence import Sequence


def check_fits(seq: Sequence, num_blocks: int, max_num_seqs: int) -> None:
    """Raises InvalidRequest for a sequence that an empty pool could not run to its end."""
    tokens = max(seq.end_len, len(seq.token_ids) + 1)
    if -(-tokens // seq.block_size) > num_blocks:
        raise InvalidRequest(
            f"the request may need {tokens} tokens of KV, and this node's pool holds {num_blocks * seq.block_size}; "
            "shorten the prompt or lower max_tokens",
            "max_tokens",
        )
    n = seq.params.n
    if n > max_num_seqs or seq.blocks_needed + n - 1 > num_blocks:
        raise InvalidRequest(
            f"n is {n}; this node runs {max_num_seqs} at once, and each needs a block of KV beside the prompt's", "n"
        )


def who_leaves_the_line(seq: Sequence, tenants: Tenants, max_waiting: int) -> Sequence | None:
    """Whom a newcomer displaces where the lines are full: the last of the longest line for its weight, if that is
    longer than its own tenant's would be. Raises Overloaded where it is not. None where there is room."""
    if tenants.num_waiting < max_waiting:
        return None
    own = tenants.get(seq.tenant)
    longest = max(tenants.busy, key=lambda tenant: len(tenant.waiting) / tenant.weight)
    untold = [other for other in longest.waiting if not other.admissions]  # the others have been promised an answer
    mine = (len(own.waiting) if own else 0) + 1
    if longest is own or not untold or len(longest.waiting) / longest.weight <= mine / seq.weight:
        raise Overloaded(f"{max_waiting} requests are waiting on this node already; try again later")
    return untold[-1]


def may_pass(
    seq: Sequence, first: Sequence, tenants: Tenants, num_blocks: int, max_num_seqs: int, blocks_held: Held
) -> bool:
    """Whether a sequence may be let in although `first`, whose tenant's turn it is, does not fit: as far as its tenant
    stays within its share of places and blocks, and until it has been served a whole pool more than the other's. Then
    it waits as well, and what becomes free gathers for `first`."""
    own, other = tenants[seq.tenant], tenants[first.tenant]
    share = own.weight / sum(tenant.weight for tenant in tenants.busy)
    return (
        places_of(own.active.values()) + seq.params.n <= max_num_seqs * share
        and blocks_held(own.name, ()) + seq.blocks_needed <= num_blocks * share
        and own.ahead - other.ahead <= num_blocks * seq.block_size
    )
