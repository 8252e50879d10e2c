"""A TCP proxy in front of a store node, which does what networks do and writes down what passes."""

import asyncio
import time

CHUNK = 256 * 1024


class Wire:
    """On a free loopback port, `address`, which the node behind it advertises. All may be set at any time:

    `delay`: seconds by which each piece is late, in both directions. `rate`: bytes a second that the node's answers
    have, together; 0 is no bound. `hold_at`: when the node has sent so many bytes nothing goes on any more; `holding`
    is set then. `flips`: bytes, counted over all that the node sends, of which a bit is turned over. `seen`: all that
    passed in either direction, if it is a bytearray.
    """

    def __init__(self) -> None:
        self.delay = 0.0
        self.rate = 0.0
        self.hold_at: int | None = None
        self.holding = asyncio.Event()
        self.flips: set[int] = set()
        self.seen: bytearray | None = None
        self.sent = 0  # by the node
        self.connections = 0
        self._open: dict[asyncio.Task, asyncio.StreamWriter] = {}

    async def start(self) -> "Wire":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def lead_to(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._to = host, int(port)

    async def end(self) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._open)

    def cut(self) -> None:
        """All connections of the moment."""
        for task, writer in self._open.items():
            writer.transport.abort()
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        self._open[task] = writer
        task.add_done_callback(self._open.pop)
        try:
            onward, there = await asyncio.open_connection(*self._to)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass(reader, there, from_node=False))
                    both.create_task(self._pass(onward, writer, from_node=True))
            finally:
                there.transport.abort()
        except* (OSError, EOFError, asyncio.CancelledError):  # one side is gone, and so is the other then
            pass
        finally:
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_node: bool) -> None:
        """What is on its way is bounded by how long it is."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, piece = await on_the_way.get()
                await asyncio.sleep(due - time.monotonic())
                writer.write(piece)
                await writer.drain()
                if not piece:
                    raise EOFError

        async with asyncio.TaskGroup() as both:
            both.create_task(deliver())
            while piece := await reader.read(CHUNK):
                if from_node:
                    piece = await self._change(piece)
                if self.seen is not None:
                    self.seen += piece
                on_the_way.put_nowait((time.monotonic() + self.delay, piece))
            on_the_way.put_nowait((time.monotonic() + self.delay, b""))

    async def _change(self, piece: bytes) -> bytes:
        start, end = self.sent, self.sent + len(piece)
        self.sent = end
        if self.hold_at is not None and end >= self.hold_at:
            self.holding.set()
            await asyncio.get_running_loop().create_future()
        if self.rate:
            await asyncio.sleep(len(piece) / self.rate)
        if any(start <= at < end for at in self.flips):
            changed = bytearray(piece)
            for at in self.flips:
                if start <= at < end:
                    changed[at - start] ^= 1
            piece = bytes(changed)
        return piece
