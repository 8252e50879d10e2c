"""*Continue* a token sequence: pull what exists, compute the rest, give tokens."""

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial

import grpc

from kvferry.common.config import WorkerConfig
from kvferry.common.errors import InvalidRequest
from kvferry.common.process import Notifier
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import DecodeServicer, add_DecodeServicer_to_server
from kvferry.common.wire import answers_errors, first_command, logprobs_to_wire
from kvferry.engine.sequence import Sequence, Status, TokenEvent
from kvferry.engine.transfer import BackgroundPublisher
from kvferry.engine.worker import WatchedService, Worker, serve_worker
from kvferry.kvstore.client import StoreClient


async def serve(config: WorkerConfig, notifier: Notifier, stop: asyncio.Event) -> None:
    """Run a decode process until `stop` is set. Raises KvferryError with one sentence when it cannot start."""
    await serve_worker(config, StoreClient.of_worker, DecodeService, add_DecodeServicer_to_server, notifier, stop)


class DecodeService(WatchedService, DecodeServicer):
    log = logging.getLogger(__name__)

    @answers_errors
    async def Continue(
        self, commands: AsyncIterator[pb.ContinueCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ContinueEvent]:
        with self._worker.stream():
            opening = (await first_command(commands)).open
            seq = self._worker.open_sequence(opening.sequence)
            continuation = Continuation(self._worker, seq, opening.expects_fill)
            tasks = [asyncio.create_task(continuation.follow(commands)), asyncio.create_task(continuation.run())]
            try:
                async for event in continuation.events(tasks):
                    yield event
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


class Continuation:
    """One continued sequence. `follow` takes in what its fill reports, `run` generates, `events` tells the router."""

    def __init__(self, worker: Worker, seq: Sequence, expects_fill: bool):
        self._engine, self._transfer = worker.engine, worker.transfer
        self._seq = seq
        self._fill = pb.FillProgress(done=not expects_fill)
        self._opening_len = len(seq.token_ids)
        self._fill_moved = asyncio.Event()
        self._admitted = self._restored = False
        self._outbox: asyncio.Queue[pb.ContinueEvent | None] = asyncio.Queue()
        self._publishers: dict[int, BackgroundPublisher] = {}

    async def follow(self, commands: AsyncIterator[pb.ContinueCommand]) -> None:
        """The router relays the fill's reports; each replaces the one before. Its closing means that none will come."""
        async for command in commands:
            if command.WhichOneof("command") != "progress":
                raise InvalidRequest("a continue is opened once; after that only a fill's progress may follow")
            self._fill.CopyFrom(command.progress)
            self._fill_moved.set()
        self._fill.done = True
        self._fill_moved.set()

    async def run(self) -> None:
        try:
            await self._engine.generate(self._seq, self._restore, self._take)
            for publisher in self._publishers.values():  # a chat's next turn begins with these blocks
                await publisher.drain()
            self._outbox.put_nowait(None)
        finally:
            for publisher in self._publishers.values():
                await publisher.close()

    def _take(self, event: TokenEvent) -> None:
        """What a step did: publish what it computed, send what it chose."""
        seq = event.seq
        if (publisher := self._publishers.get(seq.id)) is None:
            first = 0 if seq is self._seq else seq.blocks_computed  # what branches share, one of them publishes
            publisher = self._transfer.background(seq, partial(self._transfer.offer, seq), first)
            self._publishers[seq.id] = publisher
        publisher.advance()
        if event.prompt_logprobs:
            told = pb.PromptLogprobs(tokens=map(logprobs_to_wire, event.prompt_logprobs))
            self._outbox.put_nowait(pb.ContinueEvent(prompt_logprobs=told))
        if event.token is not None:
            tokens = pb.Tokens(
                token_ids=[event.token],
                finish_reason=event.finish_reason,
                choice=event.seq.params.choice,
                logprobs=[logprobs_to_wire(event.logprobs)] if event.logprobs else [],
            )
            self._outbox.put_nowait(pb.ContinueEvent(tokens=tokens))

    async def _restore(self, seq: Sequence) -> None:
        """Pull the prefix; while the fill is under way, exactly what it reports. Called again after a preemption."""
        if not self._admitted:
            self._admitted = True
            self._outbox.put_nowait(pb.ContinueEvent(admitted=pb.Admitted()))
        while True:
            self._fill_moved.clear()
            self._learn_first_tokens(seq)
            # Once the fill is over, whatever else is there too: somebody may have published it meanwhile.
            upto = len(seq.names) if self._fill.done else self._fill.committed_blocks
            await self._transfer.pull(seq, upto)
            if self._fill.done and not self._fill_moved.is_set():
                break
            await self._fill_moved.wait()
        if not self._restored and seq.status is Status.RESTORING:  # else it was pushed out, and comes again
            self._restored = True
            self._outbox.put_nowait(pb.ContinueEvent(restored=pb.Restored(reuse=self._reuse(seq))))

    def _learn_first_tokens(self, seq: Sequence) -> None:
        """The fill has chosen them, and the router has sent them: the sequence goes on from there."""
        if len(seq.token_ids) > self._opening_len or not self._fill.first_tokens:
            return
        known = enumerate(self._fill.first_tokens, start=seq.params.choice)
        going_on = [(choice, first.token_id) for choice, first in known if not first.finish_reason]
        if seq.params.n > 1:
            seq.first_tokens = tuple(going_on)
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

    async def events(self, tasks: list[asyncio.Task[None]]) -> AsyncIterator[pb.ContinueEvent]:
        """What to send, in order. Raises what a task raised."""
        for task in tasks:
            task.add_done_callback(self._on_task_end)
        while (event := await self._outbox.get()) is not None:
            yield event
        for task in tasks:
            if task.done():
                task.result()

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._outbox.put_nowait(None)
