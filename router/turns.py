"""Threads for what would hold the event loop, and whose turn it is."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """A few threads for the work of many tenants. A tenant's own is begun in order, and tenants are served in turn, so
    nobody waits for more than a piece of each other tenant's. Who is cancelled, as by a deadline, waits no longer; what
    a thread has begun it ends."""

    def __init__(self, name: str, threads: int = 1):
        self._threads = ThreadPoolExecutor(threads, name)
        self._free = threads
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the tenant that is next first

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` gives, or raises."""
        if self._free:
            self._free -= 1
        else:
            await self._turn(tenant)
        try:
            working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError:  # the threads are closed
            self._next()
            raise
        working.add_done_callback(self._next)
        return await asyncio.shield(working)

    async def _turn(self, tenant: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._next()  # it was given, and is not taken
            elif turn in (queue := self._waiting.get(tenant, deque())):
                queue.remove(turn)
                if not queue:
                    del self._waiting[tenant]
            raise

    def _next(self, done: asyncio.Future | None = None) -> None:
        """A thread is free."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            queue = self._waiting.pop(tenant)
            turn = queue.popleft()
            if queue:
                self._waiting[tenant] = queue
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def check_integrity(self) -> None:
        """Raises AssertionError when somebody waits for a thread that is free, or a tenant for nothing."""
        if self._free and any(not turn.done() for queue in self._waiting.values() for turn in queue):
            raise AssertionError("there is a thread for who waits")
        if not all(self._waiting.values()):
            raise AssertionError("a tenant is kept that waits for nothing")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
