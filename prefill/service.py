"""*Fill* a token sequence: reuse what exists, compute the rest, publish it, give the next token."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import closing
from functools import partial

import grpc

from kvferry.common.config import WorkerConfig
from kvferry.common.errors import InvalidRequest
from kvferry.common.process import Notifier
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import PrefillServicer, add_PrefillServicer_to_server
from kvferry.common.wire import answers_errors, first_command, logprobs_to_wire
from kvferry.engine.sequence import Sequence, TokenEvent
from kvferry.engine.transfer import BackgroundPublisher, FillHolding
from kvferry.engine.worker import WatchedService, Worker, serve_worker
from kvferry.kvstore.client import StoreClient


async def serve(config: WorkerConfig, notifier: Notifier, stop: asyncio.Event) -> None:
    """Run a prefill process until `stop` is set. Raises KvferryError with one sentence when it cannot start."""
    await serve_worker(config, StoreClient.of_worker, PrefillService, add_PrefillServicer_to_server, notifier, stop)


class PrefillService(WatchedService, PrefillServicer):
    log = logging.getLogger(__name__)

    @answers_errors
    async def Fill(
        self, commands: AsyncIterator[pb.FillCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.FillReport]:
        """Report until everything is published, then keep it leased until the router closes its side."""
        with self._worker.stream():
            opening = await first_command(commands)
            seq = self._worker.open_sequence(opening.open, limit=1)
            with closing(Fill(self._worker, seq)) as fill:  # also if the wait below is cut short
                computing = asyncio.create_task(fill.run())
                try:
                    async for report in fill.reports(computing):
                        yield report
                    async for _ in commands:
                        raise InvalidRequest("a fill takes one command, which opens it")
                finally:
                    computing.cancel()
                    await asyncio.gather(computing, return_exceptions=True)


class Fill:
    """One fill. `run` computes; `reports` tells, each time more than the last, what there is."""

    def __init__(self, worker: Worker, seq: Sequence):
        self._engine, self._transfer = worker.engine, worker.transfer
        self._seq = seq
        self._holding = FillHolding(worker.transfer, seq)
        self._report = pb.FillReport()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        await self._holding.open()
        publisher = self._transfer.background(self._seq, self._publish)
        try:
            await self._engine.generate(self._seq, self._restore, partial(self._take, publisher))
            await publisher.drain()
            self._tell(done=True)
        finally:
            await publisher.close()

    def _take(self, publisher: BackgroundPublisher, event: TokenEvent) -> None:
        """What a step did: publish what it computed; tell the first token, of each choice."""
        publisher.advance()
        if event.token is not None:
            told = logprobs_to_wire(event.logprobs) if event.logprobs else None
            self._report.first_tokens.add(token_id=event.token, finish_reason=event.finish_reason, logprobs=told)
            self._changed.set()

    async def _restore(self, seq: Sequence) -> None:
        """Pull what the store has and the page pool has not, and say how much that was."""
        reused = seq.num_reused
        pulled = await self._transfer.pull(seq, len(seq.names)) * seq.block_size
        await self._holding.replace_missing()
        self._report.reuse.CopyFrom(
            pb.Reuse(
                gpu_tokens=reused,
                host_tokens=pulled,
                computed_tokens=len(seq.token_ids) - reused - pulled,
                pulled_bytes=pulled // seq.block_size * seq.scope.layout.block_bytes,
            )
        )
        self._tell(started=True, committed_blocks=self._holding.committed)

    async def _publish(self, blocks: list[int], first: int) -> None:
        published = await self._holding.publish(blocks, first)
        self._report.reuse.published_bytes += published * self._seq.scope.layout.block_bytes
        self._tell(committed_blocks=self._holding.committed)

    def _tell(self, **news: object) -> None:
        self._report.holder = self._transfer.store.address
        for name, value in news.items():
            setattr(self._report, name, value)
        self._changed.set()

    async def reports(self, computing: asyncio.Task[None]) -> AsyncIterator[pb.FillReport]:
        """Each report is whole and replaces the one before. Ends after the one that says done; raises what the
        computation raised."""
        computing.add_done_callback(lambda _: self._changed.set())
        report = pb.FillReport()
        while not report.done:
            await self._changed.wait()
            self._changed.clear()
            if computing.done():
                computing.result()
            report = pb.FillReport()
            report.CopyFrom(self._report)
            yield report

    def close(self) -> None:
        self._holding.close()
