"""A TCP proxy in front of a real server, which does to replies what a bad network does."""

import asyncio
import ssl
from collections.abc import Callable

CHUNK = 65536
TICK_S = 1e-6


class Proxy:
    """On a free loopback port. `delay`: seconds until a piece of a reply goes on. `change`: what becomes of a
    piece; None breaks the connection off with a reset. Both may be set at any time."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None):
        self.delay: Callable[[], float] = lambda: 0.0
        self.change: Callable[[bytes], bytes | None] = lambda piece: piece
        self.connections = 0
        self._to = port
        self._tls = tls
        self._open: dict[asyncio.Task, asyncio.StreamWriter] = {}

    async def start(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def end(self) -> None:
        self._server.close()
        for writer in self._open.values():
            writer.transport.abort()
        await asyncio.gather(*self._open)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        self._open[task] = writer
        task.add_done_callback(self._open.pop)
        try:
            onward, there = await asyncio.open_connection("127.0.0.1", self._to)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(forth(reader, there))
                    both.create_task(self._back(onward, writer))
            finally:
                there.transport.abort()
        except* (OSError, EOFError):  # one side is gone, and so is the other then
            pass
        finally:
            writer.transport.abort()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pieces keep their order, and a delay of one does not add to the next one's."""
        loop = asyncio.get_running_loop()
        due = 0.0
        while piece := await reader.read(CHUNK):
            due = max(due + TICK_S, loop.time() + self.delay())
            if (piece := self.change(piece)) is None:
                break
            loop.call_at(due, writer.write, piece)
            await asyncio.sleep(0)
        await asyncio.sleep(due - loop.time() + TICK_S)
        raise EOFError


async def forth(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(CHUNK):
        writer.write(piece)
        await writer.drain()
    raise EOFError
