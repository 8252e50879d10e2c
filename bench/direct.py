"""For benches: a decode node, called over gRPC without a router."""

import asyncio
from collections.abc import AsyncIterator

import grpc

from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import DecodeStub
from kvferry.router.subscription import Subscription

PATIENCE_S = 60.0


class DirectDecode:
    """`start` it before it is called, and `close` it."""

    def __init__(self, channel: grpc.aio.Channel):
        self.stub = DecodeStub(channel)
        self._subscription = Subscription()

    async def start(self) -> None:
        opened = asyncio.Event()

        async def tell() -> None:
            opened.set()

        self._listening = asyncio.create_task(self._subscription.run(self.stub, tell))
        async with asyncio.timeout(PATIENCE_S):
            await opened.wait()

    def call(self) -> tuple[grpc.aio.StreamUnaryCall, asyncio.Queue[pb.ContinueEvent | None], dict[str, str | int]]:
        """A call that is not open yet, the events that it will give, and what its opening must say for that."""
        events: asyncio.Queue[pb.ContinueEvent | None] = asyncio.Queue()
        stream = self._subscription.add(events.put_nowait)
        return self.stub.Continue(), events, {"subscriber": self._subscription.subscriber, "stream": stream}

    async def tokens(self, sequence: pb.Sequence) -> AsyncIterator[pb.Tokens]:
        """Have it continued, to its end. Raises TimeoutError, and grpc.aio.AioRpcError."""
        call, events, told = self.call()
        await call.write(pb.ContinueCommand(open=pb.ContinueOpen(sequence=sequence, **told)))
        async with asyncio.timeout(PATIENCE_S):
            while (event := await events.get()) is not None and not event.HasField("finished"):
                if event.HasField("tokens"):
                    yield event.tokens
        self._subscription.remove(told["stream"])
        await call  # to its end, so that nothing of it is left

    async def close(self) -> None:
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
