"""Which tenant is served next: the one that has had the fewest tokens for its weight.

After the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant's
counter grows by the tokens computed for it over its weight, and one that begins to wait is lifted to the least counter
of those who wait, so that nobody saves up. Within a tenant the lower priority number goes first, then the older.
"""

import math
from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from operator import attrgetter

from kvferry.engine.sequence import Sequence, Status

RANK = attrgetter("rank")


class Tenant:
    """One tenant's sequences: those that wait, first in line first, and those that hold blocks."""

    def __init__(self, name: str, served: float):
        self.name = name
        self.weight = 1.0
        self.served = served  # tokens computed, over the weight
        self.last_turn = 0  # the sequence that was the last to get tokens, where there were not enough for all
        self.waiting: list[Sequence] = []
        self.active: dict[int, Sequence] = {}

    @property
    def ahead(self) -> float:
        """What it has been served, once all that it holds blocks for is computed too."""
        pending = sum(len(seq.token_ids) - seq.num_computed for seq in self.active.values())
        return self.served + pending / self.weight


class Tenants:
    """All tenants that have sequences here, or that have had more than others and could come back."""

    def __init__(self) -> None:
        self._tenants: dict[str, Tenant] = {}

    def __getitem__(self, name: str) -> Tenant:
        return self._tenants[name]

    @property
    def busy(self) -> list[Tenant]:
        return [tenant for tenant in self._tenants.values() if tenant.waiting or tenant.active]

    @property
    def num_waiting(self) -> int:
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    def get(self, name: str) -> Tenant | None:
        return self._tenants.get(name)

    def enqueue(self, seq: Sequence) -> None:
        """Put a sequence in its tenant's line."""
        tenant = self._tenants.get(seq.tenant)
        if tenant is None or not tenant.waiting:
            tenant = self._begin_line(seq.tenant)
        tenant.weight = seq.weight
        insort(tenant.waiting, seq, key=RANK)

    def _begin_line(self, name: str) -> Tenant:
        """A tenant whose counter is lifted to the least of the others' that have a line, or else that are active: who
        asked for little does not shut them out later. Who is idle and behind that is forgotten."""
        others = {other: tenant for other, tenant in self._tenants.items() if other != name}
        lines = [tenant.served for tenant in others.values() if tenant.waiting]
        floor = min(lines or [tenant.served for tenant in others.values() if tenant.active], default=math.inf)
        for other, idle in others.items():
            if not (idle.waiting or idle.active) and idle.served <= floor:
                del self._tenants[other]
        if name not in self._tenants:
            self._tenants[name] = Tenant(name, 0.0)
        tenant = self._tenants[name]
        if math.isfinite(floor):
            tenant.served = max(tenant.served, floor)
        return tenant

    def next_waiting(self, blocked: Collection[Tenant] = ()) -> Tenant | None:
        """The tenant whose turn it is to have a sequence admitted, apart from those whose first one does not fit."""
        lines = [tenant for tenant in self._tenants.values() if tenant.waiting and tenant not in blocked]
        if len(lines) < 2:
            return lines[0] if lines else None
        return min(lines, key=lambda tenant: (tenant.ahead, tenant.waiting[0].id))

    def charge(self, tokens: Mapping[str, int]) -> None:
        """Count tokens that a step computed, by tenant."""
        for name, count in tokens.items():
            tenant = self._tenants[name]
            tenant.served += count / tenant.weight

    def split(self, budget: int, wanted: Mapping[str, int]) -> Counter[str]:
        """Tokens of a step for each tenant: in proportion to the weights, what one does not want goes to the others
        (max-min fairness), and what does not divide to the one that has had the least."""
        order = sorted(wanted, key=lambda name: self._tenants[name].served)
        given: Counter[str] = Counter()
        hungry = [name for name in order if wanted[name]]
        while budget and hungry:
            weight = sum(self._tenants[name].weight for name in hungry)
            pot = budget
            for name in hungry:
                fair = int(pot * self._tenants[name].weight / weight) or 1
                more = min(fair, wanted[name] - given[name], budget)
                given[name] += more
                budget -= more
            hungry = [name for name in hungry if given[name] < wanted[name]]
        return given

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError when a line or an active set is not what the sequences' states say."""
        seqs = list(sequences)
        for name, tenant in self._tenants.items():
            waiting = [s for s in seqs if s.tenant == name and s.status is Status.WAITING]
            active = [s for s in seqs if s.tenant == name and s.status in (Status.RESTORING, Status.RUNNING)]
            if tenant.waiting != sorted(waiting, key=RANK) or sorted(tenant.active) != sorted(s.id for s in active):
                raise AssertionError(f"tenant {name} has sequences in the wrong place")
