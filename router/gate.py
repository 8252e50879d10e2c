"""What the requests under way hold of the router itself: a place each, and memory for their bodies."""

from typing import Self

from kvferry.common.errors import Overloaded
from kvferry.common.values import counted
from kvferry.router.quota import beyond


class Gate:
    """At most so many requests, and so many bytes of their bodies. One for a router; nothing in it waits."""

    def __init__(self, requests: int, body_bytes: int):
        self._requests, self._body_bytes = requests, body_bytes
        self.requests = self.body_bytes = 0  # under way

    def enter(self) -> "Place":
        """A request has come; it holds its place until that is closed. Raises Overloaded."""
        if self.requests >= self._requests:
            told = f"this server serves {counted(self.requests, 'request')} already; try again later"
            raise beyond("max_concurrent", Overloaded(told))
        self.requests += 1
        return Place(self)

    def _hold(self, size: int, held: int) -> None:
        others = self.body_bytes - held
        if others and self.body_bytes + size > self._body_bytes:
            told = f"the bodies of other requests take {others} of the {self._body_bytes} bytes that this server has"
            raise beyond("max_bodies_size", Overloaded(f"{told} for them; try again later"))
        self.body_bytes += size

    def _leave(self, held: int) -> None:
        self.requests -= 1
        self.body_bytes -= held


class Place:
    """One request's. A context manager, to be entered once."""

    def __init__(self, gate: Gate):
        self._gate = gate
        self._held = 0

    def hold(self, size: int) -> None:
        """So many more bytes of the body have come. The only body there is always has room. Raises Overloaded."""
        self._gate._hold(size, self._held)
        self._held += size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended: object) -> None:
        self._gate._leave(self._held)
