"""What a router's continues give, on its way: together, in order, bounded, and told of when nobody listens."""

import asyncio
import signal
import sys
from contextlib import aclosing

import grpc
import pytest

from kvferry.common.errors import InvalidRequest
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import DecodeServicer, add_DecodeServicer_to_server
from kvferry.common.wire import SERVER_OPTIONS
from kvferry.decode import subscriber as module
from kvferry.decode.subscriber import Subscriber


def token(stream: int, token_id: int) -> pb.ContinueEvent:
    return pb.ContinueEvent(stream=stream, tokens=pb.Tokens(token_ids=[token_id]))


def seen(message: pb.StepEvents) -> list[tuple[int, int]]:
    return [(event.stream, event.tokens.token_ids[0]) for event in message.events]


def test_what_comes_without_a_pause_travels_together():
    async def main():
        subscriber = Subscriber()
        async with asyncio.timeout(10), aclosing(subscriber.messages()) as messages:
            assert seen(await anext(messages)) == [], "the first one says that there is somebody"
            for stream in (1, 2, 3):
                subscriber.send(token(stream, stream + 10))
            assert seen(await anext(messages)) == [(1, 11), (2, 12), (3, 13)]
            following = asyncio.create_task(anext(messages))
            await asyncio.sleep(0)
            assert not following.done(), "nothing was sent"
            subscriber.send(token(2, 22))
            subscriber.send(token(1, 21))
            assert seen(await following) == [(2, 22), (1, 21)]

    asyncio.run(main())


def test_a_message_is_bounded(monkeypatch):
    """By what gRPC carries: log probabilities of many prompts could make a larger one."""
    monkeypatch.setattr(module, "MOST_BYTES", 3 * token(1, 1).ByteSize())
    large = pb.ContinueEvent(stream=1, tokens=pb.Tokens(token_ids=range(1000)))

    async def main():
        subscriber = Subscriber()
        async with asyncio.timeout(10), aclosing(subscriber.messages()) as messages:
            await anext(messages)
            for event in [*(token(1, i) for i in range(1, 8)), large, token(1, 9)]:
                subscriber.send(event)
            sizes, events = [], []
            while len(events) < 9:
                message = await anext(messages)
                sizes.append(len(message.events))
                events += [event.tokens.token_ids[0] for event in message.events]
            assert sizes == [3, 3, 1, 1, 1]
            assert events == [1, 2, 3, 4, 5, 6, 7, 0, 9]

    asyncio.run(main())


def test_flushed_is_when_it_went_out():
    async def main():
        subscriber = Subscriber()
        messages = subscriber.messages()
        async with asyncio.timeout(10):
            await anext(messages)
            subscriber.send(token(1, 1))
            flushed = asyncio.create_task(subscriber.flushed())
            await asyncio.sleep(0)
            assert seen(await anext(messages)) == [(1, 1)]
            await asyncio.sleep(0)
            assert not flushed.done(), "it is being sent"
            following = asyncio.create_task(anext(messages))  # as gRPC does when it has been
            await flushed
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    asyncio.run(main())


def test_continues_end_when_nobody_listens():
    cancelled = []

    async def main():
        subscriber = Subscriber()
        messages = subscriber.messages()
        await anext(messages)
        with subscriber.carries(1, lambda: cancelled.append(1)), subscriber.carries(2, lambda: cancelled.append(2)):
            with subscriber.carries(3, lambda: cancelled.append(3)):
                pass
            with pytest.raises(InvalidRequest, match="number 2 is open"), subscriber.carries(2, print):
                pass
            subscriber.send(token(1, 1))
            waiting = asyncio.create_task(subscriber.flushed())
            await asyncio.sleep(0)
            await messages.aclose()
            assert cancelled == [1, 2]
            async with asyncio.timeout(10):
                await waiting
                await subscriber.flushed()

    asyncio.run(main())


def test_closing_ends_it_behind_all_that_was_sent():
    async def main():
        subscriber = Subscriber()
        subscriber.send(token(1, 1))
        subscriber.close()
        async with asyncio.timeout(10):
            assert [seen(message) async for message in subscriber.messages()] == [[], [(1, 1)]]
        idle = Subscriber()
        messages = idle.messages()
        await anext(messages)
        following = asyncio.create_task(anext(messages, None))
        await asyncio.sleep(0)
        idle.close()
        async with asyncio.timeout(10):
            assert await following is None

    asyncio.run(main())


LISTENER = """
import asyncio, sys, grpc
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import DecodeStub

async def main():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        async for _ in DecodeStub(channel).Subscribe(pb.Subscription(subscriber="s")):
            print("listens", flush=True)

asyncio.run(main())
"""


class Listened(DecodeServicer):
    def __init__(self):
        self.subscriber = Subscriber()

    async def Subscribe(self, subscription, context):
        async with aclosing(self.subscriber.messages()) as messages:
            async for message in messages:
                yield message


def test_a_router_that_stands_still_is_let_go(tmp_path):
    """Its connection is there, and nothing is read: its continues must not hold their blocks for ever."""

    async def main():
        service, server = Listened(), grpc.aio.server(options=SERVER_OPTIONS)
        add_DecodeServicer_to_server(service, server)
        address = f"unix:{tmp_path}/decode"
        server.add_insecure_port(address)
        await server.start()
        listener = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LISTENER, address, stdout=asyncio.subprocess.PIPE
        )
        cancelled = asyncio.Event()
        try:
            async with asyncio.timeout(60):
                assert await listener.stdout.readline() == b"listens\n"
                with service.subscriber.carries(1, cancelled.set):
                    listener.send_signal(signal.SIGSTOP)
                    await cancelled.wait()
        finally:
            listener.kill()
            await listener.wait()
            await server.stop(0)
            del server  # while its loop runs

    asyncio.run(main())
