"""What one connection brings, from the socket into slots.

A few megabytes at a time: one step is received while the next has its slots already and the one before is committed, so
that the thread never waits for slots, a worker copies the first blocks while the last are on their way, and what was
only promised displaces nothing.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

from kvferry.common.hashing import BlockName
from kvferry.kvstore.arena import ArenaMap
from kvferry.kvstore.index import Index
from kvferry.kvstore.peering import Sent
from kvferry.kvstore.peers import Inflow, Steps
from kvferry.kvstore.protocol import Written

STEPS = 8  # in so many what one connection brings is granted and committed,
STEP_LEAST, STEP_MOST = 2**20, 16 * 2**20  # within these bytes a step
STEPS_GRANTED = 2  # at once: the one that arrives, and the next
MAX_PARTS = 512  # buffers of one recvmsg; the system takes 1024


class Coming(NamedTuple):
    """A block that is reserved here, and what verifies it."""

    name: BlockName
    parent: BlockName
    sent: Sent


class Landing:
    """`landed`: so many leading ones of `coming` are committed. Belongs to the event loop."""

    def __init__(
        self,
        index: Index,
        connection: int,
        lease: int,
        arena: ArenaMap,
        coming: Sequence[Coming],
        changed: Callable[[], None],
    ):
        self.landed = 0
        self._index, self._connection, self._lease = index, connection, lease
        self._arena = arena
        self._coming = coming
        self._changed = changed
        size = len(coming) * arena.block_bytes // STEPS
        self._step = min(max(1, min(max(size, STEP_LEAST), STEP_MOST) // arena.block_bytes), MAX_PARTS)
        self._steps: Steps = SimpleQueue()
        self._written: list[Written] = []  # what was granted; the slots of the landed ones are not ours any more
        self._ended = False  # nothing more is granted

    async def run(self, inflow: Inflow, threads: ThreadPoolExecutor, least: Callable[[], float]) -> None:
        """Until all that there is room for has landed. Raises what `inflow.receive` raises. However this ends, no
        thread writes to the slots then, and what did not come stays reserved unless there was no room for it."""
        loop = asyncio.get_running_loop()
        try:
            with self._arena.in_use():
                for _ in range(STEPS_GRANTED):
                    self._grant()
                receiving = loop.run_in_executor(
                    threads, inflow.receive, self._steps,
                    lambda count: loop.call_soon_threadsafe(self._arrived, count), least,
                )  # fmt: skip
                try:
                    await asyncio.shield(receiving)
                except asyncio.CancelledError:
                    inflow.interrupt()
                    self._steps.put([])
                    await asyncio.gather(receiving, return_exceptions=True)
                    raise
                finally:
                    while not self._steps.empty():
                        self._steps.get().clear()  # no view may outlive the arena's use
        finally:
            left = [block.slot for block in self._written[self.landed :]]
            self._index.abort(self._connection, left, keep=True)
            self._changed()

    def _arrived(self, count: int) -> None:
        """A step is full."""
        try:
            self._grant()
            done = self.landed + count
            self._index.commit(self._connection, self._lease, self._written[self.landed : done])
            self.landed = done
        except BaseException:
            self._ended = True
            self._steps.put([])  # the thread waits for no step that nobody grants
            raise
        self._changed()

    def _grant(self) -> None:
        """Hand the next step to the thread, as far as there is room; behind the last one, an empty one."""
        if self._ended:
            return
        first = len(self._written)
        step = self._coming[first : first + self._step]
        _, slots = self._index.grant(self._connection, self._lease, [block.name for block in step])
        slots = slots[: slots.index(None)] if None in slots else slots
        self._written += [
            Written(block.name, block.parent, slot, block.sent.salt, block.sent.proofs)
            for block, slot in zip(step, slots, strict=False)
        ]
        if slots:
            self._steps.put([self._arena.slot(slot) for slot in slots])
        if len(slots) < len(step):
            rest = [block.name for block in self._coming[len(self._written) :]]
            self._index.withdraw(self._connection, self._lease, rest)
        self._ended = len(slots) < len(step) or len(self._written) == len(self._coming)
        if self._ended:
            self._steps.put([])
