"""What the requests under way hold of the router itself: a place each, and memory for what their clients sent."""

from collections import Counter
from typing import Self

from kvferry.common.errors import Overloaded
from kvferry.common.values import counted
from kvferry.router.quota import beyond


class Gate:
    """At most so many requests, and so many bytes of their bodies, or of what is made of them. One for a router;
    nothing in it waits. Where it is `shared` by several tenants, each has at most half of what the others leave, so
    there is always something for one that comes later; but one request, and one body, it has in any case where there
    is room."""

    def __init__(self, requests: int, body_bytes: int):
        self._requests, self._body_bytes = requests, body_bytes
        self.shared = False
        self.requests = self.body_bytes = 0  # under way
        self._requests_of: Counter[str] = Counter()
        self._bytes_of: Counter[str] = Counter()

    def enter(self, tenant: str) -> "Place":
        """A request of a tenant's has come; it holds its place until that is closed. Raises Overloaded."""
        if self.requests >= self._requests:
            told = f"this server serves {counted(self.requests, 'request')} already; try again later"
            raise beyond("max_concurrent", Overloaded(told))
        own = self._requests_of[tenant]
        if self.shared and own and own >= (self._requests - self.requests + own) // 2:
            told = f"this tenant has {counted(own, 'request')} under way, its share of what this server can serve"
            raise beyond("max_concurrent", Overloaded(f"{told}; try again later"))
        self.requests += 1
        self._requests_of[tenant] += 1
        return Place(self, tenant)

    def _hold(self, tenant: str, size: int, held: int) -> None:
        others, own = self.body_bytes - held, self._bytes_of[tenant]
        if others and self.body_bytes + size > self._body_bytes:
            told = f"the bodies of other requests take {others} of the {self._body_bytes} bytes that this server has"
            raise beyond("max_bodies_size", Overloaded(f"{told} for them; try again later"))
        if self.shared and own > held and own + size > (self._body_bytes - self.body_bytes + own) // 2:
            told = f"the bodies of this tenant's other requests take {own - held} bytes, its share of what this server"
            raise beyond("max_bodies_size", Overloaded(f"{told} has for them; try again later"))
        self._take(tenant, size)

    def _take(self, tenant: str, size: int) -> None:
        self.body_bytes += size
        self._bytes_of[tenant] += size

    def _leave(self, tenant: str, held: int) -> None:
        self._take(tenant, -held)
        self.requests -= 1
        self._requests_of[tenant] -= 1
        if not self._requests_of[tenant]:
            del self._requests_of[tenant], self._bytes_of[tenant]

    def check_integrity(self) -> None:
        """Raises AssertionError when the sums are not those of the tenants, or one is kept that has no request."""
        if self.requests != self._requests_of.total() or self.body_bytes != self._bytes_of.total():
            raise AssertionError("what is under way is not what the tenants have under way")
        if any(count <= 0 for count in self._requests_of.values()) or min(self._bytes_of.values(), default=0) < 0:
            raise AssertionError("a tenant without a request, or with less than nothing, is kept")


class Place:
    """One request's. A context manager, to be entered once."""

    def __init__(self, gate: Gate, tenant: str):
        self._gate, self._tenant = gate, tenant
        self._held = 0

    def hold(self, size: int) -> None:
        """So many more bytes of the body have come. The only body there is always has room. Raises Overloaded."""
        self._gate._hold(self._tenant, size, self._held)
        self._held += size

    def keep(self, size: int) -> None:
        """The body is gone; what was made of it has so many bytes."""
        self._gate._take(self._tenant, size - self._held)
        self._held = size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended: object) -> None:
        self._gate._leave(self._tenant, self._held)
