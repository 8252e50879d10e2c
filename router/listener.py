"""The clients' sockets. HTTP is aiohttp's; ours are its bounds, and the words for what is no HTTP."""

import asyncio
import logging
import resource
import socket
import uuid
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.http_parser import RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy

from kvferry.common.errors import ConfigError, HeadersTooLarge, Internal, InvalidRequest, KvferryError
from kvferry.router.limits import Limits
from kvferry.router.refusals import SERVER, error_response

LAST_WORDS_S = 0.5  # for answers that say that the server stops
LINGER_S = 2.0  # what is left of a refused request's body is read and dropped for so long, so that the answer is seen
MAX_HEADERS = 128
READ_BYTES = 2**14  # at once: in chunks of a byte each it is a few milliseconds of work
UNSENT_BYTES = 2**16  # that the system holds for a client; what is more waits here, so who reads slowly is seen to read
CONNECTIONS = 2**14
RESERVED = 256  # descriptors for all else: workers, store, files, the operators' connections
TELL_S = 60.0  # at most so often that there are too many connections

log = logging.getLogger(__name__)


def connections_allowed() -> int:
    """How many connections of clients there may be, with the descriptors that the process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = CONNECTIONS + RESERVED if soft == resource.RLIM_INFINITY else min(CONNECTIONS + RESERVED, soft)
    return max(most - RESERVED, most // 2)


async def listen(
    app: web.Application, host: str, port: int, limits: Limits, connections: int = CONNECTIONS
) -> web.AppRunner:
    """Serve `app`; a client that goes cancels its handler, and one that sends no whole head in time is dropped. One
    connection more than there may be ends the one that has been without a request for longest. Raises ConfigError when
    the address is taken."""
    app.on_response_prepare.append(tell_who_serves)
    runner = Runner(
        app,
        connections=connections,
        auto_decompress=False,  # what inflates to a thousand times its size would be work before it is known whose
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=LAST_WORDS_S,
        keepalive_timeout=limits.header_s,
        lingering_time=LINGER_S,
        max_line_size=limits.header_bytes,
        max_field_size=limits.header_bytes,
        max_headers=MAX_HEADERS,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    return runner


async def tell_who_serves(request: web.Request, response: web.StreamResponse) -> None:
    """Instead of the versions of Python and aiohttp, which are nobody's business."""
    response.headers["Server"] = SERVER


class Runner(web.AppRunner):
    """Runs an application over connections of ours."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        given = {name: value for name, value in self._kwargs.items() if name != "handler_cancellation"}

        def request_of(message: RawRequestMessage, *rest: Any) -> web.BaseRequest:
            """What a client expects is left to the guard: aiohttp answers it before a route is asked."""
            if "Expect" not in message.headers:
                return made.request_factory(message, *rest)
            headers = CIMultiDict(message.headers)
            expected = ", ".join(headers.popall("Expect"))
            request = made.request_factory(message._replace(headers=CIMultiDictProxy(headers)), *rest)
            if message.version >= HttpVersion11:
                request["expected"] = expected.lower()
            return request

        return Server(
            made.request_handler,
            request_factory=request_of,
            handler_cancellation=made.handler_cancellation,
            **given,
        )


class Server(web.Server):
    """At most so many `connections`."""

    def __init__(self, *given: Any, connections: int, **named: Any):
        super().__init__(*given, **named)
        self._most, self._tell_at = connections, 0.0

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: "Connection", transport: asyncio.Transport) -> None:
        if len(self._connections) >= self._most:
            self._tell()
            idle = next((one for one in self._connections if one.idle), None)
            if idle is None:
                transport.abort()
            else:
                idle.force_close()
        super().connection_made(handler, transport)

    def _tell(self) -> None:
        if self._loop.time() >= self._tell_at:
            log.warning("there are %d connections, and more come: those without a request are closed", self._most)
            self._tell_at = self._loop.time() + TELL_S


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ()

    @property
    def idle(self) -> bool:
        """Whether it waits for the head of a request."""
        return self._waiter is not None and not self._waiter.done()

    def connection_made(self, transport: asyncio.Transport) -> None:
        transport.max_size = READ_BYTES
        unsent = (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        transport.get_extra_info("socket").setsockopt(*unsent)
        super().connection_made(transport)

    async def finish_response(self, request: web.BaseRequest, *rest: Any) -> tuple[web.StreamResponse, bool]:
        """After the answer to a request whose body nobody wants, of a length that was not told, nothing is taken in any
        more: it is dropped as it comes, for its chunks may be work. One of a told length is read to its end."""
        if unwanted := request.content_length is None and not request.content.is_eof():
            rest[0].force_close()
        try:
            return await super().finish_response(request, *rest)
        finally:
            if unwanted:
                self.close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what never became a request, or failed outside of the routes. Raises ConnectionError where
        there is nobody to answer."""
        if isinstance(exc, ConnectionError):
            raise exc
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer has begun, so it cannot become an error") from exc
        response = error_response(self._said_of(exc), uuid.uuid4().hex)
        response.force_close()
        return response

    def _said_of(self, exc: BaseException | None) -> KvferryError:
        """Nothing of what the client sent: a key may be in it."""
        if isinstance(exc, LineTooLong):
            return HeadersTooLarge(
                f"a line of the request's head is larger than the {self.max_field_size} bytes that this server takes"
            )
        if isinstance(exc, BadHttpMessage) and "Too many headers" in exc.message:
            return HeadersTooLarge(f"the request has more than the {self.max_headers} headers that this server takes")
        if isinstance(exc, BadHttpMessage):
            return InvalidRequest("what came is not an HTTP request")
        log.error("a connection failed", exc_info=exc)
        return Internal("the router failed on this request; its log has the cause")
