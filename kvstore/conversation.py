"""One client's side of the node: what it says after its hello, and what it is answered."""

import asyncio
import logging

from kvferry.common.hashing import BlockName
from kvferry.kvstore import protocol as say
from kvferry.kvstore.index import Index
from kvferry.kvstore.protocol import ProtocolError

log = logging.getLogger(__name__)

MAX_WAITING = 1024  # look-ups that one connection may have waiting


class Waiters:
    """Who waits for a name that is being computed. Nothing but futures: waiting holds no lease."""

    def __init__(self, index: Index):
        self._index = index
        self._futures: dict[BlockName, set[asyncio.Future[None]]] = {}

    def wake(self) -> None:
        """Wake those whose name is no longer being computed. Call after every change of the index."""
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
    ):
        self._index = index
        self._waiters = waiters
        self._hello = hello
        self._reader = reader
        self._writer = writer
        self._lookups: set[asyncio.Task] = set()
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
            for task in self._lookups:
                task.cancel()
            self._index.disconnect(self._connection)
            self._waiters.wake()

    def _answer(self, request: say.Request) -> say.Reply | None:
        """The reply, at once; None for a look-up that waits, which answers by itself."""
        index, connection = self._index, self._connection
        if not self._hello.block_bytes and not is_harmless(request):
            raise ProtocolError(f"an observer may not {type(request).__name__.lower()}")
        match request:
            case say.Lookup(id=number, span=span, lease=lease) if not request.wait_s:
                return say.Matched(number, index.lookup(connection, span.names, lease=lease))
            case say.Lookup():
                self._wait(request)
                return None
            case say.Reserve(id=number, span=span, tenant=tenant):
                return say.Reserved(number, index.reserve(connection, span, tenant=tenant))
            case say.Grant(id=number, lease=lease, names=names):
                return say.Granted(number, *index.grant(connection, lease, names))
            case say.Commit(id=number, lease=lease, blocks=blocks):
                return say.Committed(number, index.commit(connection, lease, blocks))
            case say.Abort(id=number, slots=slots):
                index.abort(connection, slots)
            case say.Release(id=number, lease=lease):
                return say.Released(number, index.release(connection, lease))
            case say.Quarantine(id=number, name=name, slot=slot):
                if index.quarantine(name, slot):
                    log.warning("a block failed verification; its slot %d is quarantined", slot)
            case say.Stats(id=number):
                return say.Counted(number, index.stats())
        return say.Done(request.id)

    def _wait(self, request: say.Lookup) -> None:
        if len(self._lookups) >= MAX_WAITING:
            raise ProtocolError(f"more than {MAX_WAITING} look-ups wait on one connection")
        task = asyncio.create_task(self._lookup_later(request))
        self._lookups.add(task)
        task.add_done_callback(self._lookups.discard)

    async def _lookup_later(self, request: say.Lookup) -> None:
        """Look up as soon as nobody computes the first missing name, or the time is over. Holds nothing until then."""
        deadline = asyncio.get_running_loop().time() + request.wait_s
        while (name := self._index.being_computed(request.span.names)) is not None:
            if not await self._waiters.wait(name, deadline):
                break
        match = self._index.lookup(self._connection, request.span.names, lease=request.lease)
        try:
            await self._send(say.Matched(request.id, match))
        except OSError as error:
            log.debug("nobody takes the answer to a look-up: %r", error)  # run() sees the connection end too

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
