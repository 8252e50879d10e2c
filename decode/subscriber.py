"""What a router's continues give, on its way to that router."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from kvferry.common.errors import InvalidRequest
from kvferry.common.proto import worker_pb2 as pb

MOST_BYTES = 2**20  # of events that travel together, or one larger event


class Subscriber:
    """A router that listens to this node. Events wait here until a message takes all of them: those of a step, which
    come without a pause, travel together."""

    def __init__(self) -> None:
        self._waiting: list[pb.ContinueEvent] = []
        self._some = asyncio.Event()
        self._cancels: dict[int, Callable[[], object]] = {}
        self._flushes: list[asyncio.Future[None]] = []
        self._closing = self._closed = False

    @contextmanager
    def carries(self, stream: int, cancel: Callable[[], object]) -> Iterator[None]:
        """While its continue `stream` is open. `cancel` is called when nobody listens any more."""
        if stream in self._cancels:
            raise InvalidRequest(f"a continue with the number {stream} is open already")
        self._cancels[stream] = cancel
        try:
            yield
        finally:
            del self._cancels[stream]

    def send(self, event: pb.ContinueEvent) -> None:
        self._waiting.append(event)
        self._some.set()

    async def flushed(self) -> None:
        """Until all that was sent before is out, or nobody listens any more."""
        if self._closed:
            return
        flush = asyncio.get_running_loop().create_future()
        self._flushes.append(flush)
        self._some.set()
        await flush

    def close(self) -> None:
        """Let `messages` end, once all that was sent before is out."""
        self._closing = True
        self._some.set()

    async def messages(self) -> AsyncIterator[pb.StepEvents]:
        """All that is sent, in order. When this ends, so does every continue."""
        flushes: list[asyncio.Future[None]] = []
        try:
            yield pb.StepEvents()
            while self._waiting or not self._closing:
                await self._some.wait()
                self._some.clear()
                waiting, self._waiting = self._waiting, []
                flushes, self._flushes = self._flushes, []
                for some in bounded(waiting):
                    yield pb.StepEvents(events=some)
                settle(flushes)
        finally:
            self._closed = True
            settle(flushes + self._flushes)
            for cancel in list(self._cancels.values()):
                cancel()


def bounded(events: list[pb.ContinueEvent]) -> Iterator[list[pb.ContinueEvent]]:
    """The events in parts of at most `MOST_BYTES`, or of one event."""
    part: list[pb.ContinueEvent] = []
    size = 0
    for event in events:
        size += event.ByteSize()
        if part and size > MOST_BYTES:
            yield part
            part, size = [], event.ByteSize()
        part.append(event)
    if part:
        yield part


def settle(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
