"""What a client expects of the server before it sends a body, and of itself after a refusal."""

import asyncio
import json

import httpx
import openai
import pytest
from aiohttp import web

from kvferry.common.errors import DeadlineExceeded, Internal, NotANumber, Unauthenticated
from kvferry.router.accounting import Metrics
from kvferry.router.gate import Gate
from kvferry.router.guard import guard, read_body
from kvferry.router.limits import Limits
from kvferry.router.listener import listen
from kvferry.router.refusals import error_response

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def echo(request: web.Request) -> web.Response:
    if "Authorization" not in request.headers:
        raise Unauthenticated("no API key")
    with Gate(1, 9).enter("a") as place:
        return web.Response(body=await read_body(request, Limits(body_bytes=9), place))


def answers(head: str, version: str = "1.1", path: str = "/echo", length: int = 4) -> tuple[bytes, bytes]:
    """What comes before the body is sent, within a moment, and what comes after it."""

    async def main() -> tuple[bytes, bytes]:
        app = web.Application(middlewares=[guard(Limits(), Metrics())])
        app.router.add_post("/echo", echo)
        runner = await listen(app, "127.0.0.1", 0, Limits())
        reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
        begin = f"POST {path} HTTP/{version}\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n{head}\r\n"
        writer.write(begin.encode())
        try:
            before = await asyncio.wait_for(reader.read(4096), 0.3)
        except TimeoutError:
            before = b""
        writer.write(b"body")
        after = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await runner.cleanup()
        return before, after

    return asyncio.run(main())


def refusal(received: bytes) -> tuple[int, str]:
    """Status and code of an answer in OpenAI's shape, which has the request's id."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"X-Request-Id: " in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


KEY = "Authorization: Bearer a\r\n"


def test_a_body_is_asked_for_once_it_is_wanted():
    before, after = answers(f"{KEY}Expect: 100-Continue\r\n")
    assert before == CONTINUE
    assert after.startswith(b"HTTP/1.1 200 ")
    assert after.endswith(b"\r\n\r\nbody")


@pytest.mark.parametrize(
    ("head", "more", "status", "code"),
    [
        ("Expect: 100-continue\r\n", {}, 401, "invalid_api_key"),
        (f"{KEY}Expect: 100-continue\r\n", {"path": "/nowhere"}, 404, "not_found"),
        (f"{KEY}Expect: 100-continue\r\n", {"length": 10}, 413, "request_too_large"),
        (f"{KEY}Expect: foo\r\n", {}, 417, "expectation_failed"),
        (f"{KEY}Expect: 100-continue\r\nExpect: foo\r\n", {}, 417, "expectation_failed"),
        (f"{KEY}Expect: foo\r\n", {"path": "/nowhere"}, 417, "expectation_failed"),
    ],
)
def test_a_body_that_is_not_wanted_is_not_asked_for(head, more, status, code):
    assert refusal(answers(head, **more)[0]) == (status, code)


@pytest.mark.parametrize("expected", ["100-continue", "foo"])
def test_what_an_old_client_expects_is_not_known(expected):
    before, after = answers(f"{KEY}Expect: {expected}\r\n", version="1.0")
    assert (before, after.split()[1]) == (b"", b"200")


@pytest.mark.parametrize(("error", "times"), [(DeadlineExceeded, 1), (NotANumber, 1), (Internal, 2)])
def test_openais_client_asks_again_where_it_may_help(error, times):
    asked = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        answer = error_response(error("why"), "id")
        return httpx.Response(answer.status, headers=dict(answer.headers), content=answer.body)

    with httpx.Client(transport=httpx.MockTransport(refuse)) as transport:
        client = openai.OpenAI(base_url="http://a/v1", api_key="a", max_retries=1, http_client=transport)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="m", prompt="p")
    assert len(asked) == times
