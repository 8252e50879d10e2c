"""Who is there: one watch stream per worker address, and what each worker last said of itself."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from kvferry.common.block import BlockLayout
from kvferry.common.errors import Unavailable
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import DecodeStub, PrefillStub
from kvferry.common.wire import CHANNEL_OPTIONS, KEEPALIVE, layout_from_wire
from kvferry.router.subscription import Subscription

RECONNECT_S = 0.1
SILENT_S = 5.0  # a node sends its status every second; one that is silent for so long is taken for dead
OPTIONS = (
    *CHANNEL_OPTIONS,
    *KEEPALIVE,
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the workers say of the model they run. `tokenizer`: where the router finds it."""

    name: str
    tokenizer: str
    fingerprint: bytes
    layout: BlockLayout
    vocab_size: int
    max_model_len: int


class Node:
    """One worker. `status` is None while it cannot be reached; `streams` counts the calls this router has open."""

    def __init__(self, address: str, role: str):
        self.address = address
        self.role = role
        self.channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self.stub = PrefillStub(self.channel) if role == "prefill" else DecodeStub(self.channel)
        self.status: pb.WorkerStatus | None = None
        self.subscription = Subscription()  # what a decode node's continues give
        self.streams = 0

    @property
    def ready(self) -> bool:
        heard = self.role == "prefill" or self.subscription.open
        return heard and self.status is not None and not self.status.draining

    @property
    def model(self) -> ServedModel:
        """Raises Unavailable while the node is not there."""
        if self.status is None:
            raise Unavailable(f"the {self.role} node at {self.address} is not there")
        status = self.status
        return ServedModel(
            status.served_model_name,
            status.tokenizer,
            status.fingerprint,
            layout_from_wire(status.layout),
            status.vocab_size,
            status.max_model_len,
        )

    @contextmanager
    def stream(self) -> Iterator[None]:
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1


def difference(one: Node, other: Node) -> str:
    """Why two nodes cannot share KV, for a person; empty when they can."""
    mine, theirs = one.model, other.model
    if layouts := mine.layout.differences(theirs.layout):
        return layouts
    if mine.fingerprint != theirs.fingerprint:
        return f"model fingerprint {mine.fingerprint.hex()[:12]} against {theirs.fingerprint.hex()[:12]}"
    return ""


class Nodes:
    """All workers this router was told of."""

    def __init__(self, prefill: tuple[str, ...], decode: tuple[str, ...]):
        self.prefill = [Node(address, "prefill") for address in prefill]
        self.decode = [Node(address, "decode") for address in decode]
        self.version = 0  # counts changes
        self._changed = asyncio.Condition()
        self._watching: list[asyncio.Task[None]] = []
        self._refused: set[str] = set()

    @property
    def all(self) -> list[Node]:
        return [*self.prefill, *self.decode]

    def start(self) -> None:
        self._watching = [asyncio.create_task(self._watch(node)) for node in self.all]
        self._watching += [asyncio.create_task(self._subscribe(node)) for node in self.decode]

    async def close(self) -> None:
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for node in self.all:
            await node.channel.close()

    async def _watch(self, node: Node) -> None:
        while True:
            try:
                call = node.stub.Watch(pb.WatchRequest())
                while True:
                    async with asyncio.timeout(SILENT_S):
                        status = await call.read()
                    if status is grpc.aio.EOF:
                        break
                    await self._set_status(node, status)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                log.debug("watching %s: %s", node.address, type(error).__name__)
            await self._set_status(node, None)
            await asyncio.sleep(RECONNECT_S)

    async def _subscribe(self, node: Node) -> None:
        while True:
            try:
                await node.subscription.run(node.stub, self.tell)
            except Exception:  # a node that nobody listens to would be lost
                log.exception("listening to %s failed", node.address)
            node.subscription = Subscription()
            await self.tell()
            await asyncio.sleep(RECONNECT_S)

    async def _set_status(self, node: Node, status: pb.WorkerStatus | None) -> None:
        came, went = node.status is None and status is not None, node.status is not None and status is None
        node.status = status
        if came:
            log.info("%s node at %s is there", node.role, node.address)
        if went:
            log.warning("%s node at %s is gone", node.role, node.address)
        await self.tell()

    async def tell(self) -> None:
        """Something that who waits may be waiting for has changed."""
        self.version += 1
        async with self._changed:
            self._changed.notify_all()

    async def changed_since(self, version: int) -> None:
        """Wait until `version` is another one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.version != version)

    def mark_gone(self, node: Node) -> None:
        """A call to the node broke: place nothing there until it speaks again."""
        node.status = None

    def partners(self, decode: Node) -> list[Node]:
        """The prefill nodes that are ready and whose KV this decode node can use. Others are logged, once, with the
        difference."""
        partners = []
        for node in self.prefill:
            if not node.ready or node.model.name != decode.model.name:
                continue
            if reason := difference(node, decode):
                refusal = f"prefill {node.address} is not paired with decode {decode.address}: {reason}"
                if refusal not in self._refused:
                    self._refused.add(refusal)
                    log.error(refusal)
                continue
            partners.append(node)
        return partners

    async def wait_for(self, found: Callable[[], bool], seconds: float) -> bool:
        """Wait until `found()`, looked at whenever a node's status changes; False when time is up."""
        if found():
            return True
        async with self._changed:
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait_for(found)
            except TimeoutError:
                return False
        return True

    def missing(self) -> str:
        """Why the router is not ready, for a person; empty when it is."""
        ready = [node for node in self.decode if node.ready]
        if not ready:
            return "no decode node is ready"
        if self.prefill and not any(self.partners(node) for node in ready):
            return "no prefill node is ready for a decode node"
        return ""
