"""Who is there: one watch stream per worker address, and what each worker last said of itself."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc

from kvferry.common.block import BlockLayout
from kvferry.common.credentials import Credentials, LiveCredentials
from kvferry.common.errors import NotAllowed, Unavailable
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.wire import error_of, layout_from_wire
from kvferry.router.links import Link
from kvferry.router.subscription import Subscription

RECONNECT_S = 0.1
REFUSED_S = 2.0  # until a worker that we cannot speak to is looked at again
FORGET_S = 10.0
SILENT_S = 5.0  # a node sends its status every second; one that is silent for so long is taken for dead
LOOK_S = 0.5  # pieces of that time, so that a time in which this process heard nothing counts as one of them at most

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the workers say of the model they run. `tokenizer`: where the router finds it, which is no part of what it
    is: folders may lie elsewhere on other hosts."""

    name: str
    tokenizer: str = field(compare=False)
    fingerprint: bytes
    layout: BlockLayout
    vocab_size: int
    max_model_len: int


class Node:
    """One worker. `streams` counts the calls this router has open. `following`: a link with newer certificates, which
    takes the place of `link` once it is ready; what is under way goes on where it began."""

    def __init__(self, address: str, role: str, credentials: Credentials | None = None):
        self.address = address
        self.role = role
        self.link = Link(address, role, credentials)
        self.following: Link | None = None
        self.streams = 0

    @property
    def stub(self) -> Link:
        return self.link

    @property
    def subscription(self) -> Subscription:
        return self.link.subscription

    @property
    def status(self) -> pb.WorkerStatus | None:
        """None while it cannot be reached."""
        return self.link.status

    @status.setter
    def status(self, status: pb.WorkerStatus | None) -> None:
        self.link.status = status

    @property
    def ready(self) -> bool:
        return self.link.ready and not self.status.draining

    @property
    def without_store(self) -> bool:
        """Whether no block comes to or from it, as it said last."""
        return self.status is not None and self.status.without_store

    @property
    def problem(self) -> str:
        """Why it and this router cannot speak, or not with the newest certificates, for a person; empty if they can,
        or if it is just not there."""
        return (self.following and self.following.problem) or self.link.problem

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
            with self.link.used():
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


async def patiently(read: Awaitable[T]) -> T:
    """What is read. Raises TimeoutError for who was silent for `SILENT_S` in which it could have been heard.

    Nothing of it outlives its end, also where that is an exception that somebody keeps: gRPC has a connection open for
    as long as there is one of its calls.
    """
    loop = asyncio.get_running_loop()
    left = round(SILENT_S / LOOK_S)
    try:
        async with asyncio.timeout(None) as limit:

            def look() -> None:
                nonlocal left, alarm
                left -= 1
                if left:
                    alarm = loop.call_later(LOOK_S, look)
                else:
                    limit.reschedule(loop.time())

            alarm = loop.call_later(LOOK_S, look)
            return await read
    finally:
        alarm.cancel()
        alarm = limit = look = read = None


class Nodes:
    """All workers this router was told of."""

    def __init__(self, prefill: tuple[str, ...], decode: tuple[str, ...], live: LiveCredentials | None = None):
        now = live.now if live else None
        self.prefill = [Node(address, "prefill", now) for address in prefill]
        self.decode = [Node(address, "decode", now) for address in decode]
        self.version = 0  # counts changes
        self._live = live
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused: set[str] = set()

    @property
    def all(self) -> list[Node]:
        return [*self.prefill, *self.decode]

    def start(self) -> None:
        for node in self.all:
            self._attend(node, node.link)
        if self._live is not None:
            self._spawn(self._live.watch(self._renew))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for node in self.all:
            for link in filter(None, (node.link, node.following)):
                await link.close()

    # -- links -----------------------------------------------------------------------------------------------------

    def _attend(self, node: Node, link: Link) -> None:
        link.tasks.append(asyncio.create_task(self._watch(node, link)))
        if node.role == "decode":
            link.tasks.append(asyncio.create_task(self._subscribe(node, link)))

    def _renew(self, credentials: Credentials) -> None:
        """There are other certificates: have a link with them beside each that has none of these."""
        for node in self.all:
            if node.link.secure:
                if node.following is not None:
                    self._spawn(node.following.close())
                node.following = Link(node.address, node.role, credentials)
                self._attend(node, node.following)

    def _follow(self, node: Node) -> None:
        """New calls go over the newer link, if it is ready; the older one is closed when nothing uses it."""
        if node.following is not None and node.following.ready:
            older, node.link, node.following = node.link, node.following, None
            log.info("%s node at %s: new calls go with the new certificates", node.role, node.address)
            self._spawn(self._close_unused(older))

    async def _close_unused(self, link: Link) -> None:
        try:
            await link.unused()
        finally:
            await link.close()

    async def _watch(self, node: Node, link: Link) -> None:
        look_at, clock = 0.0, asyncio.get_running_loop().time
        while True:
            heard, refusal = False, ""
            try:
                refusal = await self._hear(node, link)
                heard = link.heard.is_set()
                await self._set_status(node, link, None)
                if refusal:
                    self._note_problem(node, link, refusal)
                elif not heard and clock() >= look_at:
                    look_at = clock() + REFUSED_S
                    await self._wait_for_trust(node, link)
            except Exception:  # a node that nobody watches would be lost
                log.exception("watching %s failed", node.address)
            await asyncio.sleep(REFUSED_S if refusal else RECONNECT_S)

    async def _hear(self, node: Node, link: Link) -> str:
        """What the worker says of itself, until it breaks off. Why it would not say it, if it has said so."""
        try:
            call = link.Watch(pb.WatchRequest())
            while True:
                status = await patiently(call.read())
                if status is grpc.aio.EOF:
                    return ""
                await self._set_status(node, link, status)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            log.debug("watching %s: %s", node.address, type(error).__name__)
            why = error_of(error) if isinstance(error, grpc.aio.AioRpcError) else None
            return f"it refuses us: {why}" if isinstance(why, NotAllowed) else ""

    async def _wait_for_trust(self, node: Node, link: Link) -> None:
        """While worker and router cannot speak for reasons that do not pass by themselves, say why, once, and knock
        from time to time."""
        while problem := await link.why_refused():
            if not link.problem:
                await link.redial()
            self._note_problem(node, link, problem)
            await self.tell()
            await asyncio.sleep(REFUSED_S)
        link.problem = ""

    def _note_problem(self, node: Node, link: Link, problem: str) -> None:
        if problem != link.problem:
            meanwhile = "; calls go on with the certificates of before" if link is not node.link else ""
            log.error("%s node at %s: %s%s", node.role, node.address, problem, meanwhile)
        link.problem = problem

    async def _subscribe(self, node: Node, link: Link) -> None:
        while True:
            await link.heard.wait()
            try:
                await link.subscription.run(link, partial(self._opened, node))
            except Exception:  # a node that nobody listens to would be lost
                log.exception("listening to %s failed", node.address)
            link.subscription = Subscription()
            await self.tell()
            await asyncio.sleep(RECONNECT_S)

    async def _opened(self, node: Node) -> None:
        self._follow(node)
        await self.tell()

    async def _set_status(self, node: Node, link: Link, status: pb.WorkerStatus | None) -> None:
        came, went = link.status is None and status is not None, link.status is not None and status is None
        link.status = status
        if status is None:
            link.heard.clear()
        else:
            link.heard.set()
            link.problem = ""
        if came and link is node.link:
            log.info("%s node at %s is there", node.role, node.address)
        if went and link is node.link:
            log.warning("%s node at %s is gone", node.role, node.address)
        self._follow(node)
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

    async def forget(self, node: Node, tenant: str) -> None:
        """Have a worker drop a tenant's blocks. One that is not there has none in its memory; its host's store keeps
        them, unnamed by anybody, until they are evicted."""
        try:
            await node.link.forget(tenant, FORGET_S)
        except grpc.aio.AioRpcError as error:
            log.warning("%s was not told to drop an erased tenant's blocks: %s", node.address, error.details())

    def mark_gone(self, node: Node) -> None:
        """A call to the node broke: place nothing there until it speaks again."""
        node.status = None

    def partners(self, decode: Node) -> list[Node]:
        """The prefill nodes that are ready and whose KV can come to this decode node, which without a store at both
        ends it cannot: what they fill would be computed again."""
        if decode.without_store:
            return []
        return [node for node in self._matching(decode) if not node.without_store]

    def _matching(self, decode: Node) -> list[Node]:
        """The prefill nodes that are ready and whose KV is of use to this decode node. Others are logged, once, with
        the difference."""
        matching = []
        for node in self.prefill:
            if not node.ready or node.model.name != decode.model.name:
                continue
            if reason := difference(node, decode):
                refusal = f"prefill {node.address} is not paired with decode {decode.address}: {reason}"
                if refusal not in self._refused:
                    self._refused.add(refusal)
                    log.error(refusal)
                continue
            matching.append(node)
        return matching

    def unmatched(self) -> Iterator[tuple[Node, Node, str]]:
        """Each prefill node that no ready decode node can use, beside the first that runs what is called the same, and
        why not."""
        ready = [node for node in self.decode if node.ready]
        for node in self.prefill:
            of_name = [one for one in ready if node.ready and one.model.name == node.model.name]
            if of_name and all(difference(node, one) for one in of_name):
                yield node, of_name[0], difference(node, of_name[0])

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
        if self.prefill and not any(self._matching(node) for node in ready):
            return "no prefill node is ready for a decode node"
        return ""
