"""A decode node's events find their continues; when the stream breaks, every one of them is told."""

import asyncio
from contextlib import asynccontextmanager

import grpc

from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import DecodeServicer, DecodeStub, add_DecodeServicer_to_server
from kvferry.router.subscription import Subscription


class Scripted(DecodeServicer):
    """Sends what is put into `script`, and ends at None."""

    def __init__(self):
        self.script: asyncio.Queue[pb.StepEvents | None] = asyncio.Queue()
        self.subscribers: list[str] = []

    async def Subscribe(self, subscription, context):
        self.subscribers.append(subscription.subscriber)
        while (message := await self.script.get()) is not None:
            yield message


@asynccontextmanager
async def scripted(tmp_path):
    service, server = Scripted(), grpc.aio.server()
    add_DecodeServicer_to_server(service, server)
    address = f"unix:{tmp_path}/decode"
    server.add_insecure_port(address)
    await server.start()
    async with asyncio.timeout(30), grpc.aio.insecure_channel(address) as channel:
        yield service, DecodeStub(channel)
    await server.stop(0)


def events(*told: tuple[int, int]) -> pb.StepEvents:
    some = [pb.ContinueEvent(stream=stream, tokens=pb.Tokens(token_ids=[token])) for stream, token in told]
    return pb.StepEvents(events=some)


def test_each_gets_its_own_until_the_stream_ends(tmp_path):
    async def main():
        async with scripted(tmp_path) as (service, stub):
            subscription, opened = Subscription(), asyncio.Event()
            heard: dict[int, list[int | None]] = {}
            all_heard = asyncio.Event()

            def add() -> int:
                def take(event: pb.ContinueEvent | None) -> None:
                    heard[number].append(event and event.tokens.token_ids[0])
                    if event is not None and event.tokens.token_ids[0] == 99:
                        all_heard.set()

                number = subscription.add(take)
                heard[number] = []
                return number

            async def tell() -> None:
                opened.set()

            running = asyncio.create_task(subscription.run(stub, tell))
            assert not subscription.open
            service.script.put_nowait(pb.StepEvents())
            await opened.wait()
            assert subscription.open
            assert service.subscribers == [subscription.subscriber]
            first, second, gone = add(), add(), add()
            subscription.remove(gone)
            subscription.remove(gone)
            service.script.put_nowait(events((second, 20), (first, 10), (gone, 30), (777, 1)))
            service.script.put_nowait(events((first, 11), (second, 99)))
            await all_heard.wait()
            assert heard == {first: [10, 11], second: [20, 99], gone: []}
            service.script.put_nowait(None)
            await running
            assert not subscription.open
            assert heard == {first: [10, 11, None], second: [20, 99, None], gone: []}

    asyncio.run(main())


def test_a_node_that_dies_ends_it(tmp_path):
    async def main():
        service, server = Scripted(), grpc.aio.server()
        add_DecodeServicer_to_server(service, server)
        server.add_insecure_port(f"unix:{tmp_path}/decode")
        await server.start()
        async with asyncio.timeout(30), grpc.aio.insecure_channel(f"unix:{tmp_path}/decode") as channel:
            subscription, opened, told = Subscription(), asyncio.Event(), []

            async def tell() -> None:
                opened.set()

            subscription.add(told.append)
            running = asyncio.create_task(subscription.run(DecodeStub(channel), tell))
            service.script.put_nowait(pb.StepEvents())
            await opened.wait()
            await server.stop(None)
            await running
            assert told == [None]
            assert not subscription.open
        del server  # while its loop runs

    asyncio.run(main())


def test_an_event_that_cannot_be_read_ends_its_own_continue_only(tmp_path, caplog):
    async def main():
        async with scripted(tmp_path) as (service, stub):
            subscription, opened, all_heard = Subscription(), asyncio.Event(), asyncio.Event()
            bad: list[pb.ContinueEvent | None] = []
            good: list[int] = []

            def cannot(event: pb.ContinueEvent | None) -> None:
                bad.append(event)
                if event is not None:
                    raise ValueError("of different lengths")

            def can(event: pb.ContinueEvent | None) -> None:
                if event is not None:
                    good.append(event.tokens.token_ids[0])
                if good == [1, 2]:
                    all_heard.set()

            async def tell() -> None:
                opened.set()

            one, other = subscription.add(cannot), subscription.add(can)
            running = asyncio.create_task(subscription.run(stub, tell))
            service.script.put_nowait(pb.StepEvents())
            service.script.put_nowait(events((one, 9), (other, 1), (one, 9)))
            service.script.put_nowait(events((other, 2)))
            await all_heard.wait()
            assert subscription.open
            assert [event is None for event in bad] == [False, True]
            service.script.put_nowait(None)
            await running

    asyncio.run(main())
    assert "an event of a decode node cannot be read" in caplog.text
