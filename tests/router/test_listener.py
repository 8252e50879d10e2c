"""The listener over real sockets: what a connection may cost, and how many of them there may be."""

import asyncio
import gzip
import resource
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from kvferry.common.errors import Unauthenticated
from kvferry.router.accounting import Metrics
from kvferry.router.guard import guard
from kvferry.router.limits import Limits
from kvferry.router.listener import READ_BYTES, RESERVED, UNSENT_BYTES, listen
from kvferry.router.sse import PIECE_BYTES, EventStream

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
TINY = b"1\r\n \r\n"  # a chunk of one byte
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def with_listener(handler: Handler, use: Callable[[str, int], Awaitable[None]], **named: int) -> None:
    """`use` gets the address of a listener whose POST is the handler's."""

    async def main() -> None:
        app = web.Application(middlewares=[guard(Limits(), Metrics())])
        app.router.add_post("/", handler)
        runner = await listen(app, "127.0.0.1", 0, Limits(), **named)
        try:
            async with asyncio.timeout(60):
                await use(*runner.addresses[0][:2])
        finally:
            await runner.cleanup()

    asyncio.run(main())


@pytest.mark.parametrize("coding", ["gzip", "GZip", "deflate", "br", "zstd", "gzip, gzip", "x"])
def test_an_encoded_body_is_refused_and_not_decoded(coding, caplog):
    """Whether it can be decoded or not, and whoever sends it; on a path that does not exist as well."""

    async def handler(request: web.Request) -> web.Response:
        raise AssertionError("it was asked")

    async def use(host: str, port: int) -> None:
        for body in (gzip.compress(b" " * 2**20), b"\x1f\x8b broken"):
            for path in (b"POST / ", b"POST /nowhere "):
                reader, writer = await asyncio.open_connection(host, port)
                head = HEAD.replace(b"POST / ", path) + b"Content-Encoding: %s\r\n" % coding.encode()
                writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                received = await reader.read()
                assert received.startswith(b"HTTP/1.1 415 ")
                assert b"the body has a Content-Encoding; send it as it is" in received
                writer.close()

    with_listener(handler, use)
    assert [record for record in caplog.records if record.exc_info] == []


def test_a_body_as_it_is_may_say_so():
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async def use(host: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(HEAD + b"Content-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}")
        received = await reader.read()
        assert (received[:12], received[-2:]) == (b"HTTP/1.1 200", b"{}")
        writer.close()

    with_listener(handler, use)


def test_a_turn_of_the_loop_takes_in_few_chunks():
    """However many have come: what is read at once is short, so others have their turns between."""
    pieces: list[int] = []

    async def handler(request: web.Request) -> web.Response:
        async for piece in request.content.iter_any():
            pieces.append(len(piece))
        return web.Response()

    async def use(host: str, port: int) -> None:
        with socket.create_connection((host, port)) as connection:
            await asyncio.to_thread(connection.sendall, CHUNKED + TINY * 2**17 + b"0\r\n\r\n")
            await asyncio.to_thread(connection.recv, 100)

    with_listener(handler, use)
    assert sum(pieces) == 2**17
    assert max(pieces) <= 3 * READ_BYTES // len(TINY)


def test_the_chunks_of_a_refused_body_are_dropped_as_they_come():
    """The answer is seen, and what comes after it is no work."""
    refused: list[web.Request] = []

    async def handler(request: web.Request) -> web.Response:
        refused.append(request)
        raise Unauthenticated("no API key")

    async def use(host: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(CHUNKED + TINY)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 401 ")
        assert b"\r\nConnection: close\r\n" in await reader.readuntil(b"\r\n\r\n")
        writer.write(TINY * 100_000)
        await writer.drain()
        await reader.read()  # until the other side closes
        writer.close()

    with_listener(handler, use)
    (request,) = refused
    assert request.content.total_bytes <= 10


def test_what_is_sent_ahead_of_a_reader_is_little():
    """So that one who reads slowly is seen to read: a system's send buffer grows to megabytes."""
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        stream = EventStream(request, 30)
        while True:
            await stream.data(b"x" * 1000)
            sent += 1000

    async def use(host: str, port: int) -> None:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, port))
            connection.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
            before = -1
            while sent != before:
                before = sent
                await asyncio.sleep(0.5)

    with_listener(handler, use)
    assert 0 < sent < 4 * (UNSENT_BYTES + PIECE_BYTES)


def test_silent_connections_make_room(caplog):
    """The one that has been there for longest goes first; one that has a request is let be."""
    go_on = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        await go_on.wait()
        return web.Response(text="done")

    async def use(host: str, port: int) -> None:
        busy = await asyncio.open_connection(host, port)
        busy[1].write(HEAD + b"Content-Length: 0\r\n\r\n")
        silent = []
        for _ in range(20):
            silent.append(await asyncio.open_connection(host, port))
            await asyncio.sleep(0.01)
        for reader, _ in silent[:13]:
            assert await reader.read() == b""
        asked = await asyncio.open_connection(host, port)
        asked[1].write(HEAD.replace(b"POST / ", b"GET /nowhere ") + b"\r\n")
        assert (await asked[0].read()).startswith(b"HTTP/1.1 404 ")
        assert not any(reader.at_eof() for reader, _ in silent[14:])
        go_on.set()
        assert (await busy[0].read()).endswith(b"done")
        for _, writer in (*silent, busy, asked):
            writer.close()

    with_listener(handler, use, connections=8)
    told = [record.getMessage() for record in caplog.records if "connections" in record.getMessage()]
    assert told == ["there are 8 connections, and more come: those without a request are closed"]


def test_a_connection_more_than_can_be_served_is_closed():
    async def handler(request: web.Request) -> web.Response:
        await asyncio.Event().wait()

    async def use(host: str, port: int) -> None:
        busy = []
        for _ in range(2):
            busy.append(await asyncio.open_connection(host, port))
            busy[-1][1].write(HEAD + b"Content-Length: 0\r\n\r\n")
            await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_connection(host, port)
        assert await reader.read() == b""
        assert not any(reader.at_eof() for reader, _ in busy)
        for _, one in (*busy, (reader, writer)):
            one.close()

    with_listener(handler, use, connections=2)


@pytest.mark.parametrize(("soft", "hard", "after", "most"), [(300, 1000, 1000, 744), (200, 200, 200, 100)])
def test_the_process_may_have_the_descriptors_that_the_system_allows(soft, hard, after, most):
    """Those that all else needs are not for connections."""
    assert RESERVED == 256
    script = (
        "import resource as r\nfrom kvferry.common.process import take_descriptors\n"
        "from kvferry.router.listener import connections_allowed\n"
        f"r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard}))\ntake_descriptors()\n"
        "print(connections_allowed(), *r.getrlimit(r.RLIMIT_NOFILE))"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= hard
    told = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert told.split() == [str(most), str(after), str(hard)]
