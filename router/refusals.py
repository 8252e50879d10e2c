"""Errors as answers: in OpenAI's shape, with the request's id, and when to come back."""

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

HOPELESS = (DeadlineExceeded, NotANumber)  # to try again takes as long, and gives the same


def error_response(error: BaseException, request_id: str) -> web.Response:
    outcome = outcome_of(error)
    headers = {"X-Request-Id": request_id}
    retry_after_s = getattr(error, "retry_after_s", None) or outcome.retry_after_s
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    if isinstance(error, HOPELESS):
        headers["X-Should-Retry"] = "false"  # OpenAI's clients send what got a 500 again by themselves
    if outcome.http == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if allow := getattr(error, "allow", ""):
        headers["Allow"] = allow
    return web.Response(status=outcome.http, body=error_body(error), content_type="application/json", headers=headers)


def told_of(error: web.HTTPException, request: web.Request) -> KvferryError:
    """What aiohttp itself refuses, as ours."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowed(f"{request.method} is not a method of {request.path}; use {error.headers['Allow']}",
                                error.headers["Allow"])  # fmt: skip
    if isinstance(error, web.HTTPNotFound):
        return NotFound(f"there is no {request.path[:64]} here; /openapi.json has what there is")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return too_large(request.client_max_size)
    return InvalidRequest(error.reason)


def too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {limit} bytes that this server takes")


def too_slow(limit_s: float) -> ArrivedTooSlowly:
    return ArrivedTooSlowly(f"the body did not arrive within {limit_s:g} s")
