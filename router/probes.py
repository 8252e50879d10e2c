"""Whether the router lives, whether it can answer, and what is missing: for whoever probes it, on both listeners."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import msgspec
from aiohttp import web

from kvferry.common.errors import Unavailable
from kvferry.common.store_api import StoreStats
from kvferry.common.values import counted
from kvferry.router.models import Models
from kvferry.router.refusals import error_response
from kvferry.router.sse import as_json

PATHS = ("/health", "/ready", "/ping")
NO_STORE = "the store node does not answer; until it is back, prompts are computed instead of found"
NO_DIRECTORY = (
    "the directory (Redis) does not answer the store: blocks are fetched only from where they were just computed"
)
NO_PEERS = "the store does not come to {}, whose blocks are computed again here; its log says why"
STORE_S = 0.5  # a store that takes longer keeps no probe waiting


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """`missing`: what makes it `degraded`: answers are right, and come later than they could."""

    status: str
    missing: list[str] = []


class Probes:
    """The handlers. `stats`: of this host's store; None while it does not answer."""

    def __init__(self, models: Models, stats: Callable[[], Awaitable[StoreStats | None]]):
        self._models, self._stats = models, stats

    async def missing(self, addresses: bool = False) -> list[str]:
        """What this router was told of and has not, a sentence each; with the `addresses` of workers, or without."""
        stats = await self._of_store()
        return [*filter(None, [self._models.missing()]), *self._models.absent(addresses), *missing_of(stats)]

    async def _of_store(self) -> StoreStats | None:
        try:
            async with asyncio.timeout(STORE_S):
                return await self._stats()
        except TimeoutError:
            return None

    async def health(self, request: web.Request) -> web.Response:
        return as_json(Told("ok"))

    async def ready(self, request: web.Request) -> web.Response:
        """Ready is who has a decode worker, which can compute everything by itself; who else is missing is told."""
        return self._answer(request, await self.missing())

    async def ready_for_operators(self, request: web.Request) -> web.Response:
        return self._answer(request, await self.missing(addresses=True))

    def _answer(self, request: web.Request, missing: list[str]) -> web.Response:
        if self._models.up():
            return as_json(Told("degraded" if missing else "ready", missing))
        return error_response(Unavailable("; ".join(missing)), request["id"], missing)


def missing_of(store: StoreStats | None) -> Iterator[str]:
    """What this host's store has not, for a person."""
    if store is None:
        yield NO_STORE
        return
    if store.directory == "down":
        yield NO_DIRECTORY
    if store.peers_away:
        yield NO_PEERS.format(counted(store.peers_away, "other store"))
