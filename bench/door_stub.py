"""Workers that compute nothing: a prefill and a decode node that speak the protocol, for bench/door.py.

    python bench/door_stub.py PREFILL_ADDRESS DECODE_ADDRESS MODEL TOKENIZER

Two of a request's fields say what decode does: `max_tokens` how many tokens it gives, and `seed` the gap between them
in microseconds. Streams of the same gap get theirs at the same moments, as from an engine's steps; 0 is as fast as
it goes. Prefill reports after each chunk of a prompt. Ends when its stdin does.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc

from kvferry.common.block import BlockLayout
from kvferry.common.config import EngineConfig
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import (
    DecodeServicer,
    PrefillServicer,
    add_DecodeServicer_to_server,
    add_PrefillServicer_to_server,
)
from kvferry.common.wire import SERVER_OPTIONS, first_command, layout_to_wire
from kvferry.decode.subscriber import Subscriber

LAYOUT = BlockLayout(kv_heads=2, layers=2, block_size=16, head_dim=16, dtype="float32")
CHUNK = EngineConfig.max_num_batched_tokens  # prompt tokens behind each of prefill's reports
MODEL_LEN = 16384
VOCAB = 264  # the demo model's
TOKEN = ord("k")
STATUS_S = 1.0


class Watched:
    role = ""

    def __init__(self, model: str, tokenizer: str):
        self._model, self._tokenizer = model, tokenizer

    async def Watch(
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WorkerStatus]:
        while True:
            yield pb.WorkerStatus(
                role=self.role, model="stub", fingerprint=bytes(32), layout=layout_to_wire(LAYOUT), vocab_size=VOCAB,
                max_model_len=MODEL_LEN, free_blocks=2**20, total_blocks=2**20, node=self.role,
                prefill_tokens_per_s=1e6, served_model_name=self._model, tokenizer=self._tokenizer,
            )  # fmt: skip
            await asyncio.sleep(STATUS_S)


class Prefill(Watched, PrefillServicer):
    role = "prefill"

    async def Fill(
        self, commands: AsyncIterator[pb.FillCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.FillReport]:
        length = len((await first_command(commands)).open.token_ids)
        reuse = pb.Reuse(computed_tokens=length)
        for done in range(CHUNK, length, CHUNK):
            yield pb.FillReport(committed_blocks=done // LAYOUT.block_size, started=True, reuse=reuse)
        first = [pb.FirstToken(token_id=TOKEN)]
        committed = (length - 1) // LAYOUT.block_size
        yield pb.FillReport(committed_blocks=committed, first_tokens=first, started=True, reuse=reuse, done=True)
        async for _ in commands:  # until the router has no more use for the blocks
            pass


class Decode(Watched, DecodeServicer):
    role = "decode"

    def __init__(self, model: str, tokenizer: str):
        super().__init__(model, tokenizer)
        self._subscribers: dict[str, Subscriber] = {}
        self._steps = Steps()

    async def Subscribe(
        self, subscription: pb.Subscription, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StepEvents]:
        subscriber = self._subscribers[subscription.subscriber] = Subscriber()
        async for message in subscriber.messages():
            yield message

    async def Continue(
        self, commands: AsyncIterator[pb.ContinueCommand], context: grpc.aio.ServicerContext
    ) -> pb.ContinueEnd:
        opening = (await first_command(commands)).open
        subscriber = self._subscribers[opening.subscriber]

        def tell(**event: object) -> None:
            subscriber.send(pb.ContinueEvent(stream=opening.stream, **event))

        given, length = 0, len(opening.sequence.token_ids)
        tell(admitted=pb.Admitted())
        reuse = pb.Reuse(computed_tokens=length)
        if opening.expects_fill:
            async for command in commands:
                given, arrived = len(command.progress.first_tokens), command.progress.committed_blocks
                if command.progress.done:
                    break
            reuse = pb.Reuse(host_tokens=arrived * LAYOUT.block_size, computed_tokens=length % LAYOUT.block_size)
        tell(restored=pb.Restored(reuse=reuse))
        wanted, gap = opening.sequence.sampling.max_tokens, opening.sequence.sampling.seed / 1e6
        for number in range(given, wanted):
            if number and gap:
                await self._steps.next(gap)
            reason = "length" if number == wanted - 1 else ""
            tell(tokens=pb.Tokens(token_ids=[TOKEN], finish_reason=reason))
        tell(finished=pb.Finished())
        await subscriber.flushed()
        return pb.ContinueEnd()


class Steps:
    """Moments that all streams of one gap share: whole numbers of gaps after the clock's zero."""

    def __init__(self) -> None:
        self._next: dict[float, asyncio.Event] = {}

    async def next(self, gap: float) -> None:
        loop = asyncio.get_running_loop()
        if gap not in self._next:
            self._next[gap] = asyncio.Event()
            loop.call_later(gap - loop.time() % gap, self._step, gap)
        await self._next[gap].wait()

    def _step(self, gap: float) -> None:
        self._next.pop(gap).set()


async def serve(prefill: str, decode: str, model: str, tokenizer: str) -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_PrefillServicer_to_server(Prefill(model, tokenizer), server)
    add_DecodeServicer_to_server(Decode(model, tokenizer), server)
    for address in (prefill, decode):
        server.add_insecure_port(address)
    await server.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
