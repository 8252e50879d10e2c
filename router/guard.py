"""Around every route: a request has an id and a head of bounded size, and whatever goes wrong has an answer. And its
body, read within bounds."""

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from kvferry.common.errors import (
    ExpectationFailed,
    HeadersTooLarge,
    InvalidRequest,
    KvferryError,
    UnsupportedEncoding,
    outcome_of,
)
from kvferry.common.telemetry import REQUEST_ID
from kvferry.router.accounting import Metrics
from kvferry.router.bodies import is_known
from kvferry.router.gate import Place
from kvferry.router.limits import Limits
from kvferry.router.probes import PATHS
from kvferry.router.refusals import error_response, told_of, too_large, too_slow

GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
FIRST_LINE_REST = len("  HTTP/1.1\r\n")  # beside the method and the path
LINE_REST = len(": \r\n")
CONTINUE = "100-continue"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)


def guard(limits: Limits, metrics: Metrics | None) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """The middleware: every error in OpenAI's shape, every answer with the request's id. A refusal is counted here, if
    there are `metrics`, unless the request is `counted` by its handler."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        request["id"] = given if GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        before = REQUEST_ID.set(request["id"])  # a connection's requests share one task
        try:
            check_head(request, limits)
            response = await handler(request)
        except web.HTTPException as error:
            response = refuse(request, told_of(error, request))
        except KvferryError as error:
            response = refuse(request, error)
        except ConnectionResetError:
            raise  # the client went: there is nobody to answer
        except Exception as error:
            log.exception("a request failed")
            response = error_response(error, request["id"])
        finally:
            REQUEST_ID.reset(before)
        if not response.prepared:
            response.headers["X-Request-Id"] = request["id"]
        return response

    def refuse(request: web.Request, error: KvferryError) -> web.Response:
        outcome = outcome_of(error)
        if metrics is not None and not request.get("counted"):
            metrics.requests.labels(outcome.code).inc()
        if request.path not in PATHS:  # those are asked again and again
            where = request.match_info.route.resource  # what a client made up is not written down
            path = "an unknown path" if where is None else where.canonical
            field = getattr(error, "param", None) or "the request"
            about = field if field == "the request" or is_known(field) else "an unknown field"
            whose = f"; tenant {request['tenant']}" if "tenant" in request else ""
            which = f"; limit {error.limit}" if hasattr(error, "limit") else ""
            told = (request.method, path, outcome.http, outcome.code, about, whose, which)
            log.info("%s %s refused: %d %s, for %s%s%s", *told)
        return error_response(error, request["id"])

    return guarded


def check_head(request: web.Request, limits: Limits) -> None:
    """Raises HeadersTooLarge, ExpectationFailed, UnsupportedEncoding."""
    size = len(request.method) + len(request.raw_path) + FIRST_LINE_REST + len("\r\n")
    size += sum(len(name) + len(value) + LINE_REST for name, value in request.raw_headers)
    if size > limits.header_bytes:
        raise HeadersTooLarge(
            f"the request's head has {size} bytes; this server takes {limits.header_bytes}, so send fewer headers"
        )
    if request.get("expected", CONTINUE) != CONTINUE:
        raise ExpectationFailed(f"the Expect header of a request can only be {CONTINUE}; leave it out")
    for coding in request.headers.getall("Content-Encoding", ()):
        if coding.strip().lower() not in ("", "identity"):
            raise UnsupportedEncoding("the body has a Content-Encoding; send it as it is, without that header")


async def read_body(request: web.Request, limits: Limits, place: Place) -> bytes:
    """The whole body. Raises TooLarge, before reading where its length is told, ArrivedTooSlowly, Overloaded, and
    InvalidRequest for one that is not what its headers say."""
    pieces, size = [], 0  # one buffer that grows would take up to twice as much
    if (request.content_length or 0) > limits.body_bytes:
        raise too_large(limits.body_bytes)
    if "expected" in request:  # the client waits with the body until it is told to send it
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer has not begun
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in request.content.iter_any():
                if (size := size + len(piece)) > limits.body_bytes:
                    raise too_large(limits.body_bytes)
                place.hold(len(piece))
                pieces.append(piece)
    except TimeoutError:
        raise too_slow(limits.body_s) from None
    except web.RequestPayloadError as error:
        raise InvalidRequest("the body is not as its headers say, or its chunks are broken") from error
    return b"".join(pieces)
