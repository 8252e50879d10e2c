"""One client's side of the node: what it says after its hello, and what it is answered."""

import asyncio
import logging
from collections.abc import Callable, Coroutine

from msgspec import structs

from kvferry.common.hashing import BlockName, Span
from kvferry.common.store_api import Claim, Match
from kvferry.kvstore import protocol as say
from kvferry.kvstore.directory import Key
from kvferry.kvstore.index import Index
from kvferry.kvstore.protocol import ProtocolError
from kvferry.kvstore.reach import Reach

log = logging.getLogger(__name__)

MAX_WAITING = 1024  # requests that one connection may have waiting
ARRIVAL_S = 2.0  # so long a look-up waits for the first block that is on its way


class Waiters:
    """Who waits for a name that is being computed. Nothing but futures: waiting holds no lease."""

    def __init__(self, index: Index):
        self._index = index
        self._futures: dict[BlockName, set[asyncio.Future[None]]] = {}
        self._announce: Callable[[list[Key]], None] | None = None

    def on_committed(self, announce: Callable[[list[Key]], None]) -> None:
        """Call `announce` with the blocks that came to be there."""
        self._announce = announce

    def wake(self) -> None:
        """Wake those whose name is no longer being computed. Call after every change of the index."""
        committed = self._index.take_committed()
        if committed and self._announce is not None:
            self._announce(committed)
        for name in self._index.take_settled():
            for future in self._futures.pop(name, ()):
                if not future.done():
                    future.set_result(None)

    async def wait(self, name: BlockName, deadline: float) -> bool:
        """Until `name` settles; False if `deadline` (the loop's time) comes first."""
        future = asyncio.get_running_loop().create_future()
        self._futures.setdefault(name, set()).add(future)
        try:
            async with asyncio.timeout_at(deadline):
                await future
            return True
        except TimeoutError:
            return False
        finally:
            futures = self._futures.get(name, set())
            futures.discard(future)
            if not futures:
                self._futures.pop(name, None)


class Conversation:
    """What one client says after its hello, and what it is answered."""

    def __init__(
        self,
        index: Index,
        waiters: Waiters,
        hello: say.Hello,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        reach: Reach | None = None,
        only_sealed: bool = False,
    ):
        self._reach = reach
        self._only_sealed = only_sealed
        self._index = index
        self._waiters = waiters
        self._hello = hello
        self._reader = reader
        self._writer = writer
        self._waiting: set[asyncio.Task] = set()
        self._connection = index.connect()

    async def run(self) -> None:
        """Serve until the client goes or breaks a rule. Then everything of its goes back."""
        role = self._hello.role or "client"
        try:
            while True:
                request = say.decode("request", await say.read_frame(self._reader))
                self._index.renew(self._connection)
                reply = self._answer(request)
                self._waiters.wake()
                if reply is not None:
                    await self._send(reply)
        except ProtocolError as error:
            log.warning("closing the connection of a %s: %s", role, error)
            self._writer.write(say.encode(say.Refused(str(error))))
        except (EOFError, OSError) as error:
            log.debug("a %s went: %r", role, error)
        except Exception:
            log.exception("closing the connection of a %s at a fault of ours", role)
        finally:
            for task in self._waiting:
                task.cancel()
            self._index.disconnect(self._connection)
            self._waiters.wake()

    def _answer(self, request: say.Request) -> say.Reply | None:
        """The reply, at once; None for what takes its time, and answers by itself."""
        index, connection = self._index, self._connection
        if not self._hello.block_bytes and not is_harmless(request):
            raise ProtocolError(f"an observer may not {type(request).__name__.lower()}")
        match request:
            case say.Lookup(id=number, span=span, lease=lease, again=again) if self._is_all_here(request):
                match = index.lookup(connection, span.names, lease=lease, again=again)
                self._tell_used(span, match)
                return say.Matched(number, match)
            case say.Lookup():
                self._take_time(self._lookup_later(request))
                return None
            case say.Reserve(id=number, span=span, tenant=tenant):
                reserved = say.Reserved(number, index.reserve(connection, span, tenant=tenant))
                if self._reach is None or Claim.GRANTED not in reserved.reservation.claims:
                    return reserved
                self._take_time(self._claim(request, reserved))
                return None
            case say.Grant(id=number, lease=lease, names=names):
                return say.Granted(number, *index.grant(connection, lease, names))
            case say.Commit(id=number, lease=lease, blocks=blocks):
                if self._only_sealed and not all(block.salt for block in blocks):
                    log.warning("a %s commits plain blocks, and this store takes only sealed ones", self._hello.role)
                    index.abort(connection, [block.slot for block in blocks])
                    return say.Committed(number, (say.CommitOutcome.LATE,) * len(blocks))
                return say.Committed(number, index.commit(connection, lease, blocks))
            case say.Abort(id=number, slots=slots):
                index.abort(connection, slots)
            case say.Release(id=number, lease=lease):
                return say.Released(number, index.release(connection, lease))
            case say.Quarantine(id=number, name=name, slot=slot):
                if index.quarantine(name, slot):
                    log.warning("a block failed verification; its slot %d is quarantined", slot)
            case say.Erase(tenant=tenant):
                log.info("%d blocks of an erased tenant are dropped", index.erase(tenant))
            case say.Stats(id=number):
                stats = index.stats()
                return say.Counted(number, self._reach.with_others(stats) if self._reach is not None else stats)
        return say.Done(request.id)

    def _is_all_here(self, request: say.Lookup) -> bool:
        """Whether there is nothing to wait for and nobody to ask."""
        if request.wait_s:
            return False
        return self._reach is None or self._index.missing_from(request.span.names) == len(request.span.names)

    def _take_time(self, answer: Coroutine[None, None, say.Reply]) -> None:
        """Answer when the answer is there."""
        if len(self._waiting) >= MAX_WAITING:
            answer.close()
            raise ProtocolError(f"more than {MAX_WAITING} requests wait on one connection")
        task = asyncio.create_task(self._answer_later(answer))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _answer_later(self, answer: Coroutine[None, None, say.Reply]) -> None:
        try:
            await self._send(await answer)
        except OSError as error:
            log.debug("nobody takes an answer: %r", error)  # run() sees the connection end too
        except Exception:
            log.exception("closing the connection of a %s at a fault of ours", self._hello.role)
            self._writer.transport.abort()

    async def _lookup_later(self, request: say.Lookup) -> say.Matched:
        """Look up as soon as nobody computes the first missing name, here or on another host, or the time is over. What
        others have begins to come; of what is not here at all, the first is waited for. Holds nothing until then."""
        index, span, loop = self._index, request.span, asyncio.get_running_loop()
        if request.wait_s:
            await self._wait(span, loop.time() + request.wait_s)
        coming, here = 0, index.missing_from(span.names)
        if self._reach is not None and here < len(span):
            missing = span.from_(here)
            if request.lease:
                await self._reach.bring(missing, request.tenant, request.holder)
                if not here and index.is_coming(span.names[0]):
                    await self._waiters.wait(span.names[0], loop.time() + ARRIVAL_S)
            elif not request.wait_s:
                coming = await self._reach.seen(missing)
        match = index.lookup(self._connection, span.names, lease=request.lease, again=request.again)
        self._tell_used(request.span, match)
        return say.Matched(request.id, structs.replace(match, coming=match.coming or coming))

    def _tell_used(self, span: Span, match: Match) -> None:
        """Have the directory's hints of blocks that are used go on; not before the answer is sent."""
        if self._reach is not None and match.lease:
            asyncio.get_running_loop().call_soon(self._reach.used, span, len(match.blocks))

    async def _wait(self, span: Span, deadline: float) -> None:
        while True:
            if (name := self._index.being_computed(span.names)) is not None:
                if not await self._waiters.wait(name, deadline):
                    return
                continue
            here = self._index.missing_from(span.names)
            if self._reach is not None and here < len(span):
                await self._reach.wait(span.from_(here), deadline)
            return

    async def _claim(self, request: say.Reserve, reserved: say.Reserved) -> say.Reserved:
        """A reservation, cut to what no other host computes already."""
        span, reservation = request.span, reserved.reservation
        first = await self._reach.claim(span, reservation.claims)
        if first is None:
            return reserved
        self._index.withdraw(self._connection, reservation.lease, span.names[first:])
        self._waiters.wake()
        claims = tuple(
            [Claim.TAKEN if i >= first and claim is Claim.GRANTED else claim
             for i, claim in enumerate(reservation.claims)]
        )  # fmt: skip
        lease = reservation.lease
        if not {Claim.GRANTED, Claim.PRESENT} & set(claims):  # it holds nothing any more
            self._index.release(self._connection, lease)
            lease = 0
        return say.Reserved(request.id, structs.replace(reservation, claims=claims, lease=lease))

    async def _send(self, reply: say.Reply) -> None:
        self._writer.write(say.encode(reply))
        await self._writer.drain()


def is_harmless(request: say.Request) -> bool:
    """Whether an observer may send this."""
    match request:
        case say.Lookup(lease=lease):
            return not lease
        case say.Renew() | say.Stats():
            return True
    return False
