"""Errors as answers: in OpenAI's shape, with the request's id, and when to come back."""

from collections.abc import Sequence

from aiohttp import web

from kvferry.common.errors import (
    ArrivedTooSlowly,
    DeadlineExceeded,
    InvalidRequest,
    KvferryError,
    MethodNotAllowed,
    NotANumber,
    NotFound,
    TooLarge,
    outcome_of,
)
from kvferry.router.answers import error_body

INDEX = web.AppKey("index", str)  # the path of an application's list of what it has
SERVER = "kvferry"  # what an answer's header of that name says
HOPELESS = (DeadlineExceeded, NotANumber)  # to try again takes as long, and gives the same


def error_response(error: BaseException, request_id: str, missing: Sequence[str] = ()) -> web.Response:
    outcome = outcome_of(error)
    headers = {"X-Request-Id": request_id, "Server": SERVER}
    retry_after_s = getattr(error, "retry_after_s", None) or outcome.retry_after_s
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    if isinstance(error, HOPELESS):
        headers["X-Should-Retry"] = "false"  # OpenAI's clients send what got a 500 again by themselves
    if outcome.http == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if allow := getattr(error, "allow", ""):
        headers["Allow"] = allow
    body = error_body(error, missing)
    return web.Response(status=outcome.http, body=body, content_type="application/json", headers=headers)


def told_of(error: web.HTTPException, request: web.Request) -> KvferryError:
    """What aiohttp itself refuses, as ours."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowed(f"{request.method} is not a method of {request.path}; use {error.headers['Allow']}",
                                error.headers["Allow"])  # fmt: skip
    if isinstance(error, web.HTTPNotFound):
        index = request.app.get(INDEX, "/openapi.json")
        return NotFound(f"there is no {request.path[:64]} here; {index} has what there is")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return too_large(request.client_max_size)
    return InvalidRequest(error.reason)


def too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {limit} bytes that this server takes")


def too_slow(limit_s: float) -> ArrivedTooSlowly:
    return ArrivedTooSlowly(f"the body did not arrive within {limit_s:g} s")
