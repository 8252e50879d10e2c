"""Answers on their way out: server-sent events, and bodies of any size.

Little is buffered here for a client that does not read: each write waits while the connection's send buffer is full,
and one that reads nothing for `write_s` is dropped. The workers do not wait for it: what they give meanwhile is held by
its handover, up to a bound.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-store",
    "X-Accel-Buffering": "no",  # nginx would hold events back otherwise
}
PIECE_BYTES = 64 * 2**10
DROPPED = "slow_reader"  # how a request ends whose client reads nothing, in metrics and the log

log = logging.getLogger(__name__)


class EventStream:
    """One response that is a stream of events.

    Headers go out with the first event, so a request that is refused before then still gets a status of its own.
    Writing to a client that has gone, or that is dropped, raises ConnectionResetError.
    """

    def __init__(self, request: web.Request, write_s: float, headers: Mapping[str, str] | None = None):
        self._request, self._write_s = request, write_s
        self.response = web.StreamResponse(headers={**HEADERS, **(headers or {})})

    @property
    def started(self) -> bool:
        """Whether the headers are out: from then on an error can only be an event."""
        return self.response.prepared

    async def data(self, payload: bytes) -> None:
        """Send one event. `payload` is one line, as JSON is."""
        await self._write(b"data: " + payload + b"\n\n")

    async def error(self, payload: bytes) -> None:
        """Send an event of the type `error` and close the body, without the end mark; clients of OpenAI's API see the
        `error` object in its data."""
        await self._write(b"event: error\ndata: " + payload + b"\n\n", last=True)

    async def done(self) -> None:
        """Send the end mark and close the body."""
        await self._write(b"data: [DONE]\n\n", last=True)

    async def _write(self, event: bytes, last: bool = False) -> None:
        if self.response.prepared and not last and fits(self._request, event):
            await self.response.write(event)  # most events: they wait for nobody
            return
        async with reading(self._request, self._write_s):
            if not self.response.prepared:
                await self.response.prepare(self._request)
            await self.response.write(event)
            if last:
                await self.response.write_eof()


def as_json(value: object) -> web.Response:
    """A short answer."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def send_json(
    request: web.Request, body: bytes, write_s: float, headers: Mapping[str, str]
) -> web.StreamResponse:
    """A whole answer. A large one goes out piece by piece."""
    if len(body) <= PIECE_BYTES:
        return web.Response(body=body, content_type="application/json", headers=headers)
    response = web.StreamResponse(headers={**headers, "Content-Type": "application/json"})
    response.content_length = len(body)
    for start in range(0, len(body), PIECE_BYTES):
        async with reading(request, write_s):
            if not response.prepared:
                await response.prepare(request)
            await response.write(body[start : start + PIECE_BYTES])
    async with reading(request, write_s):
        await response.write_eof()
    return response


def fits(request: web.Request, event: bytes) -> bool:
    """Whether writing an event waits for nothing: there is a connection, its client has read all that was sent, and the
    event is smaller than what the connection buffers."""
    transport = request.transport
    if transport is None or transport.is_closing():
        return False
    return len(event) <= PIECE_BYTES // 2 and not transport.get_write_buffer_size()


@asynccontextmanager
async def reading(request: web.Request, write_s: float) -> AsyncIterator[None]:
    """For a write, which waits until the client has read enough. One that does not is dropped, and with it what is done
    for its request, which is told of as `dropped` by then."""
    try:
        async with asyncio.timeout(write_s):
            yield
    except TimeoutError as error:
        request["dropped"] = DROPPED
        told = f"the client read nothing for {write_s:g} s"
        log.info("%s and is dropped", told)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError(told) from error
    except ConnectionError as error:  # aiohttp has several, by where it notices
        raise ConnectionResetError("the client has gone") from error
