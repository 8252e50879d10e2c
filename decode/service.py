"""*Continue* a token sequence: pull what exists, compute the rest, give tokens."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial

import grpc

from kvferry.common.config import WorkerConfig
from kvferry.common.errors import InvalidRequest, Unavailable
from kvferry.common.process import Notifier
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import DecodeServicer, add_DecodeServicer_to_server
from kvferry.common.wire import answers_errors, first_command, logprobs_to_wire
from kvferry.decode.subscriber import Subscriber
from kvferry.engine.sequence import Sequence, Status, TokenEvent
from kvferry.engine.transfer import BackgroundPublisher
from kvferry.engine.worker import WatchedService, Worker, serve_worker
from kvferry.kvstore.client import StoreClient


async def serve(config: WorkerConfig, notifier: Notifier, stop: asyncio.Event) -> None:
    """Run a decode process until `stop` is set. Raises KvferryError with one sentence when it cannot start."""
    await serve_worker(config, StoreClient.of_worker, DecodeService, add_DecodeServicer_to_server, notifier, stop)


class DecodeService(WatchedService, DecodeServicer):
    log = logging.getLogger(__name__)

    def __init__(self, worker: Worker):
        super().__init__(worker)
        self._subscribers: dict[str, Subscriber] = {}

    def close(self) -> None:
        super().close()
        for subscriber in self._subscribers.values():
            subscriber.close()

    @answers_errors
    async def Subscribe(
        self, subscription: pb.Subscription, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StepEvents]:
        subscriber = self._subscribers[subscription.subscriber] = Subscriber()
        try:
            async with aclosing(subscriber.messages()) as messages:
                async for message in messages:
                    yield message
        finally:
            if self._subscribers.get(subscription.subscriber) is subscriber:
                del self._subscribers[subscription.subscriber]

    @answers_errors
    async def Continue(
        self, commands: AsyncIterator[pb.ContinueCommand], context: grpc.aio.ServicerContext
    ) -> pb.ContinueEnd:
        with self._worker.stream():
            opening = (await first_command(commands)).open
            if (subscriber := self._subscribers.get(opening.subscriber)) is None:
                raise Unavailable("the router does not listen to this node")
            seq = self._worker.open_sequence(opening.sequence)

            def tell(event: pb.ContinueEvent) -> None:
                event.stream = opening.stream
                subscriber.send(event)

            continuation = Continuation(self._worker, seq, opening.expects_fill, tell)
            with subscriber.carries(opening.stream, continuation.cancel):
                await continuation.run(commands)
            await subscriber.flushed()
        return pb.ContinueEnd()


class Continuation:
    """One continued sequence. What it gives, `tell` is told at once."""

    def __init__(self, worker: Worker, seq: Sequence, expects_fill: bool, tell: Callable[[pb.ContinueEvent], None]):
        self._engine, self._transfer = worker.engine, worker.transfer
        self._seq, self._tell = seq, tell
        self._fill = pb.FillProgress(done=not expects_fill)
        self._opening_len = len(seq.token_ids)
        self._fill_moved = asyncio.Event()
        self._admitted = self._restored = False
        self._publishers: dict[int, BackgroundPublisher] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ended: set[int] = set()  # choices that are not wanted any more, and have not begun

    async def run(self, commands: AsyncIterator[pb.ContinueCommand]) -> None:
        """Generate to the end, and publish; `commands` are those after the first. Raises what ended it early."""
        generating = asyncio.create_task(self._generate())
        self._tasks = [generating, asyncio.create_task(self._follow(commands))]
        try:
            going_on = set(self._tasks)
            while not generating.done():
                done, going_on = await asyncio.wait(going_on, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task.cancelled():
                        raise Unavailable("the router does not listen to this node any more")
                    task.result()
        finally:
            self.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cancel(self) -> None:
        """Have `run` end early. May be repeated: who is being cancelled cleans up undisturbed."""
        for task in self._tasks:
            if not task.cancelling():
                task.cancel()

    async def _follow(self, commands: AsyncIterator[pb.ContinueCommand]) -> None:
        """The router relays the fill's reports; each replaces the one before. Its closing means that none will come."""
        async for command in commands:
            match command.WhichOneof("command"):
                case "progress":
                    self._fill.CopyFrom(command.progress)
                    self._fill_moved.set()
                case "end_choice":
                    self._end_choice(command.end_choice.choice)
                case _:
                    raise InvalidRequest("a continue is opened once; a fill's progress, and ends of choices may follow")
        self._fill.done = True
        self._fill_moved.set()

    def _end_choice(self, choice: int) -> None:
        if self._seq.params.n == 1:  # it has forked, unless it is for one choice only
            self._engine.end_choice(self._seq, choice)
        else:
            self._ended.add(choice)
            self._seq.first_tokens = self._going_on(self._seq.first_tokens)

    def _going_on(self, first_tokens: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """Those, by choice, that the client still wants; one at least."""
        return tuple(known for known in first_tokens if known[0] not in self._ended) or first_tokens[:1]

    async def _generate(self) -> None:
        try:
            await self._engine.generate(self._seq, self._restore, self._take)
            self._tell(pb.ContinueEvent(finished=pb.Finished()))
            for publisher in self._publishers.values():  # a chat's next turn begins with these blocks
                await publisher.drain()
        finally:
            await asyncio.gather(*[publisher.close() for publisher in self._publishers.values()])

    def _take(self, event: TokenEvent) -> None:
        """What a step did: publish what it computed, send what it chose."""
        seq = event.seq
        if (publisher := self._publishers.get(seq.id)) is None:
            first = 0 if seq is self._seq else self._opening_len // seq.block_size  # what they share, one publishes
            publisher = self._transfer.background(seq, partial(self._transfer.offer, seq), first)
            self._publishers[seq.id] = publisher
        publisher.advance()
        if event.prompt_logprobs:
            told = pb.PromptLogprobs(tokens=map(logprobs_to_wire, event.prompt_logprobs))
            self._tell(pb.ContinueEvent(prompt_logprobs=told))
        if event.token is not None:
            tokens = pb.Tokens(
                token_ids=[event.token],
                finish_reason=event.finish_reason,
                choice=event.seq.params.choice,
                logprobs=[logprobs_to_wire(event.logprobs)] if event.logprobs else [],
            )
            self._tell(pb.ContinueEvent(tokens=tokens))

    async def _restore(self, seq: Sequence) -> None:
        """Pull the prefix; while the fill is under way, exactly what it reports. Called again after a preemption."""
        if not self._admitted:
            self._admitted = True
            self._tell(pb.ContinueEvent(admitted=pb.Admitted()))
        while True:
            self._fill_moved.clear()
            self._learn_first_tokens(seq)
            # Once the fill is over, whatever else is there too: somebody may have published it meanwhile.
            upto = len(seq.names) if self._fill.done else self._fill.committed_blocks
            await self._transfer.pull(seq, upto, self._fill.holder)
            if self._fill.done and not self._fill_moved.is_set():
                break
            await self._fill_moved.wait()
        if not self._restored and seq.status is Status.RESTORING:  # else it was pushed out, and comes again
            self._restored = True
            self._tell(pb.ContinueEvent(restored=pb.Restored(reuse=self._reuse(seq))))

    def _learn_first_tokens(self, seq: Sequence) -> None:
        """The fill has chosen them, and the router has sent them: the sequence goes on from there."""
        if len(seq.token_ids) > self._opening_len or not self._fill.first_tokens:
            return
        known = enumerate(self._fill.first_tokens, start=seq.params.choice)
        going_on = [(choice, first.token_id) for choice, first in known if not first.finish_reason]
        if seq.params.n > 1:
            seq.first_tokens = self._going_on(tuple(going_on))
        else:
            seq.append(self._fill.first_tokens[0].token_id)

    def _reuse(self, seq: Sequence) -> pb.Reuse:
        """Where the KV of a restored sequence came from, and what is left to compute."""
        in_place = seq.num_computed + len(seq.filled) * seq.block_size
        pulled = in_place - seq.num_reused
        return pb.Reuse(
            gpu_tokens=seq.num_reused,
            host_tokens=pulled,
            computed_tokens=self._opening_len - in_place,
            pulled_bytes=pulled // seq.block_size * seq.scope.layout.block_bytes,
        )
