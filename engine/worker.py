"""What the prefill and the decode process have in common: an engine behind gRPC, watched, drained, shut down."""

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Protocol

import grpc

from kvferry.common.block import BlockLayout
from kvferry.common.clock import WallClock
from kvferry.common.config import WorkerConfig
from kvferry.common.credentials import LiveCredentials
from kvferry.common.errors import ConfigError, IncompatibleNode, Unavailable
from kvferry.common.process import Notifier
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.store_api import BlockStore
from kvferry.common.telemetry import REQUEST_ID
from kvferry.common.wire import SERVER_OPTIONS, answers_errors, layout_to_wire, sampling_from_wire, scope_from_wire
from kvferry.engine.callers import OnlyRoles, live_credentials, server_credentials
from kvferry.engine.engine import Engine
from kvferry.engine.loading.model import LoadedModel, load_model
from kvferry.engine.sequence import Sequence, Status
from kvferry.engine.step_thread import StepThread
from kvferry.engine.transfer import Transfer

STATUS_EVERY_S = 1.0
STATUS_AT_MOST_EVERY_S = 0.02
FAREWELL_S = 1.0

log = logging.getLogger(__name__)


class CountingStore(BlockStore, Protocol):
    """A store that counts what passed through it here, and can be opened and closed."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def erase(self, tenant: str) -> None: ...

    def on_change(self, tell: Callable[[], None]) -> None: ...

    connected: bool
    only_sealed: bool
    pulled_bytes: int
    published_bytes: int
    bad_blocks: int
    pull_bytes_per_s: float


async def serve_worker(
    config: WorkerConfig,
    open_store: Callable[[WorkerConfig, BlockLayout], CountingStore],
    service: Callable[["Worker"], "WatchedService"],
    register: Callable[["WatchedService", grpc.aio.Server], None],
    notifier: Notifier,
    stop: asyncio.Event,
) -> None:
    """Load, connect to the store, answer calls until `stop`. Raises KvferryError with one sentence when it cannot
    start."""
    thread = StepThread()
    model = await thread.run(partial(load_model, progress=notifier.progress), config.engine)
    store = open_store(config, model.layout)
    await store.start()
    try:
        worker = Worker(config, model, store, thread)
        await worker.serve(service(worker), register, notifier, stop)
    finally:
        await store.close()


class WatchedService:
    """The part of both services by which the router knows who is there."""

    log = log

    def __init__(self, worker: "Worker"):
        self._worker = worker

    @answers_errors
    async def Watch(
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WorkerStatus]:
        async for status in self._worker.watch():
            yield status

    @answers_errors
    async def Forget(self, request: pb.ForgetRequest, context: grpc.aio.ServicerContext) -> pb.Forgotten:
        await self._worker.forget(request.tenant)
        return pb.Forgotten()

    def close(self) -> None:
        """Have the streams end that go on for as long as the node does."""
        self._worker.end_watches()


class Worker:
    """One process's engine, transfer and streams. The role's service calls `open_sequence` and `stream`."""

    def __init__(self, config: WorkerConfig, model: LoadedModel, store: CountingStore, thread: StepThread):
        self.config = config
        self.model = model
        self.store = store
        self.engine = Engine(model, config.engine, thread)
        self.transfer = Transfer(self.engine.pool, self.engine.memory, store, config.single_flight_wait_s)
        self._node = uuid.uuid4().hex
        self._clock, self._version = WallClock(), version("kvferry")
        self._streams = 0
        self._draining = self._closing = False
        self._live: LiveCredentials | None = None  # while it serves, where it has certificates
        self._watchers: set[asyncio.Event] = set()
        self._idle = asyncio.Event()
        self.engine.on_change(self._tell_watchers)
        store.on_change(self._tell_watchers)

    def open_sequence(self, opening: pb.Sequence, limit: int | None = None) -> Sequence:
        """The engine's sequence for a request, which this task is for from here on. Raises IncompatibleNode if the
        router hashed for another model."""
        REQUEST_ID.set(opening.request_id)
        if opening.fingerprint != self.model.fingerprint:
            raise IncompatibleNode(
                f"the request is for model fingerprint {opening.fingerprint.hex()[:12]}, this node has "
                f"{self.model.fingerprint.hex()[:12]}"
            )
        layout: BlockLayout = self.model.layout
        params = sampling_from_wire(opening.sampling)
        return self.engine.new_sequence(
            opening.request_id,
            scope_from_wire(opening, layout, self.store.only_sealed),
            list(opening.token_ids),
            opening.prompt_len,
            params,
            params.max_tokens if limit is None else limit,
            priority=opening.priority,
            weight=opening.weight or 1.0,
        )

    async def forget(self, tenant: str) -> None:
        """Drop a tenant's blocks (by its pseudonym), in the page pool and in this host's store."""
        dropped = self.engine.pool.forget(tenant)
        log.info("tenant %s was erased: %d blocks of the page pool are dropped", tenant, dropped)
        await self.store.erase(tenant)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count a call while it is open. Raises Unavailable while draining."""
        if self._draining:
            raise Unavailable("this node is draining")
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
            if not self._streams:
                self._idle.set()
            self._tell_watchers()

    def end_watches(self) -> None:
        self._closing = True
        self._tell_watchers()

    def _tell_watchers(self) -> None:
        for changed in self._watchers:
            changed.set()

    async def watch(self) -> AsyncIterator[pb.WorkerStatus]:
        """This node's status: now, on each change, and every second."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while not self._closing:
                changed.clear()
                yield self.status()
                await asyncio.sleep(STATUS_AT_MOST_EVERY_S)
                try:
                    await asyncio.wait_for(changed.wait(), STATUS_EVERY_S)
                except TimeoutError:
                    continue
        finally:
            self._watchers.discard(changed)

    def status(self) -> pb.WorkerStatus:
        scheduler, pool = self.engine.scheduler, self.engine.pool
        return pb.WorkerStatus(
            node=self._node,
            role=self.config.role,
            model=self.config.engine.model,
            served_model_name=next(iter(self.config.engine.served_model_name), ""),
            other_names=self.config.engine.served_model_name[1:],
            tokenizer=self.config.engine.tokenizer or "",
            fingerprint=self.model.fingerprint,
            layout=layout_to_wire(self.model.layout),
            vocab_size=self.model.vocab_size,
            max_model_len=self.model.max_model_len,
            max_choices=scheduler.max_num_seqs,
            draining=self._draining,
            waiting=len(scheduler.of(Status.WAITING)),
            running=len(scheduler.of(Status.RESTORING, Status.RUNNING)),
            waiting_tokens=scheduler.waiting_tokens,
            free_blocks=pool.num_free,
            total_blocks=pool.num_blocks,
            streams=self._streams,
            tasks=len(asyncio.all_tasks()),
            prefill_tokens_per_s=self.engine.prefill_tokens_per_s,
            pull_bytes_per_s=self.store.pull_bytes_per_s,
            preemptions=scheduler.num_preemptions,
            pulled_bytes=self.store.pulled_bytes,
            published_bytes=self.store.published_bytes,
            bad_blocks=self.store.bad_blocks,
            clock=self._clock.now(),
            version=self._version,
            without_store=not self.store.connected,
            certificate_problem=self._live.fault if self._live else "",
        )

    async def serve(
        self,
        service: WatchedService,
        register: Callable[[WatchedService, grpc.aio.Server], None],
        notifier: Notifier,
        stop: asyncio.Event,
    ) -> None:
        """Answer calls until `stop`, then drain: no new streams, and up to `drain_s` for those that are open."""
        live = self._live = live_credentials(self.config)
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=() if live is None else (OnlyRoles(),))
        register(service, server)
        os.umask(0o077)  # tenants' keys come through the socket: it is for this user alone
        try:
            if live is None:
                server.add_insecure_port(self.config.listen)
            else:
                server.add_secure_port(self.config.listen, server_credentials(live))
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {self.config.listen}: {error}") from error
        await server.start()
        looking = asyncio.create_task(live.watch()) if live else None
        loop = asyncio.create_task(self.engine.run())
        stopped = asyncio.create_task(stop.wait())
        notifier.ready()
        log.info("%s node serves %s on %s", self.config.role, self.config.engine.model, self.config.listen)
        try:
            await asyncio.wait({loop, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if loop.done():
                loop.result()  # the engine's own failure ends the process: it is started anew
            await self._drain()
        finally:
            stopped.cancel()
            if looking:
                looking.cancel()
            self.engine.stop()
            service.close()
            await server.stop(FAREWELL_S)  # a peer that reads has all that was sent to it by then
            await asyncio.gather(loop, return_exceptions=True)

    async def _drain(self) -> None:
        self._draining = True
        self._tell_watchers()
        self._idle.clear()
        if self._streams:
            log.info("draining: %d streams are open", self._streams)
            try:
                await asyncio.wait_for(self._idle.wait(), self.config.drain_s)
            except TimeoutError:
                log.warning("%d streams are cut off after %g s of draining", self._streams, self.config.drain_s)
