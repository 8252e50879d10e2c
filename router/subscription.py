"""What a decode node's continues give to this router: all in one stream, whose messages have what a step chose for all
of them."""

import logging
import uuid
from collections.abc import Awaitable, Callable
from itertools import count

import grpc

from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import DecodeStub

log = logging.getLogger(__name__)

Taker = Callable[[pb.ContinueEvent | None], None]


class Subscription:
    """One such stream, from its opening to its end. A continue has a number in it."""

    def __init__(self) -> None:
        self.subscriber = uuid.uuid4().hex
        self.open = False
        self._numbers = count(1)
        self._takers: dict[int, Taker] = {}

    def add(self, taker: Taker) -> int:
        """A number for a continue. `taker` is called with each of its events, in order; with None when the stream has
        broken, and nothing more will come."""
        number = next(self._numbers)
        self._takers[number] = taker
        return number

    def remove(self, number: int) -> None:
        """Its events are dropped from here on. May be repeated."""
        self._takers.pop(number, None)

    async def run(self, stub: DecodeStub, opened: Callable[[], Awaitable[None]]) -> None:
        """Until the stream ends. `opened` is called when continues may be opened."""
        call = stub.Subscribe(pb.Subscription(subscriber=self.subscriber))
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if not self.open:
                    self.open = True
                    await opened()
                for event in message.events:
                    self._deliver(event)
        except grpc.aio.AioRpcError as error:
            log.debug("a subscription ended: %s", error.details())
        finally:
            self.open = False
            for taker in list(self._takers.values()):
                taker(None)
            call.cancel()

    def _deliver(self, event: pb.ContinueEvent) -> None:
        if (taker := self._takers.get(event.stream)) is None:
            return
        try:
            taker(event)
        except Exception:  # the others' events go on
            log.exception("an event of a decode node cannot be read")
            self.remove(event.stream)
            taker(None)
