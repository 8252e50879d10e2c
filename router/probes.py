"""Whether the router lives, whether it can answer, and what is missing: for whoever probes it, on both listeners."""

from collections.abc import Callable

import msgspec
from aiohttp import web

from kvferry.common.errors import Unavailable
from kvferry.router.models import Models
from kvferry.router.refusals import error_response
from kvferry.router.sse import as_json

PATHS = ("/health", "/ready", "/ping")
NO_STORE = "the store node does not answer; until it is back, prompts are computed instead of found"


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """`missing`: what makes it `degraded`: answers are right, and come later than they could."""

    status: str
    missing: list[str] = []


class Probes:
    """The handlers."""

    def __init__(self, models: Models, store_there: Callable[[], bool]):
        self._models, self._store_there = models, store_there

    def missing(self) -> list[str]:
        """What this router was told of and has not, a sentence each."""
        found = [*filter(None, [self._models.missing()]), *self._models.absent()]
        return found if self._store_there() else [*found, NO_STORE]

    async def health(self, request: web.Request) -> web.Response:
        return as_json(Told("ok"))

    async def ready(self, request: web.Request) -> web.Response:
        """Ready is who has a decode worker, which can compute everything by itself; who else is missing is told."""
        missing = self.missing()
        if self._models.up():
            return as_json(Told("degraded" if missing else "ready", missing))
        return error_response(Unavailable("; ".join(missing)), request["id"], missing)
