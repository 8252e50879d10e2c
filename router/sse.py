"""Server-sent events over aiohttp.

Headers go out with the first event, so a request that is refused before then still gets a status of its own.
"""

from collections.abc import Mapping

from aiohttp import web

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-store",
    "X-Accel-Buffering": "no",  # nginx would hold events back otherwise
}


class EventStream:
    """One response that is a stream of events.

    Every write waits while the connection's send buffer is full, so a slow reader holds its producer back. Writing to a
    client that has gone raises ConnectionResetError.
    """

    def __init__(self, request: web.Request, headers: Mapping[str, str] | None = None):
        self._request = request
        self.response = web.StreamResponse(headers={**HEADERS, **(headers or {})})

    @property
    def started(self) -> bool:
        """Whether the headers are out: from then on an error can only be an event."""
        return self.response.prepared

    async def data(self, payload: bytes) -> None:
        """Send one event. `payload` is one line, as JSON is."""
        await self._write(b"data: " + payload + b"\n\n")

    async def error(self, payload: bytes) -> None:
        """Send an event of the type `error`; clients of OpenAI's API see the `error` object in its data."""
        await self._write(b"event: error\ndata: " + payload + b"\n\n")

    async def done(self) -> None:
        """Send the end mark and close the body."""
        await self._write(b"data: [DONE]\n\n")
        await self.response.write_eof()

    async def _write(self, event: bytes) -> None:
        try:
            if not self.response.prepared:
                await self.response.prepare(self._request)
            await self.response.write(event)
        except ConnectionError as error:  # aiohttp has several, by where it notices
            raise ConnectionResetError("the client has gone") from error
