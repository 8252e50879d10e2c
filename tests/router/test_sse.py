"""Event streams over a real aiohttp server."""

import asyncio

import pytest
from aiohttp import ClientSession, web

from kvferry.router.sse import PIECE_BYTES, EventStream, send_json


async def serve(handler):
    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/"


def test_events_arrive_as_they_are_sent():
    async def scenario():
        go_on = asyncio.Event()

        async def handler(request):
            stream = EventStream(request, 5, {"x-request-id": "r1"})
            assert not stream.started
            await stream.data(b'{"a":1}')
            assert stream.started
            await go_on.wait()
            await stream.error(b'{"error":{}}')
            return stream.response

        runner, url = await serve(handler)
        async with ClientSession() as session, session.get(url) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            assert response.headers["X-Accel-Buffering"] == "no"
            assert "no-cache" in response.headers["Cache-Control"]
            assert response.headers["x-request-id"] == "r1"
            assert "Content-Encoding" not in response.headers
            first = await asyncio.wait_for(response.content.readuntil(b"\n\n"), 5)
            assert first == b'data: {"a":1}\n\n'
            go_on.set()
            rest = await response.content.read()
            assert rest == b'event: error\ndata: {"error":{}}\n\n', "an error takes the place of [DONE]"
        await runner.cleanup()

    asyncio.run(scenario())


def test_refused_before_the_first_event_has_a_status_of_its_own():
    async def scenario():
        async def handler(request):
            stream = EventStream(request, 5)
            assert not stream.started
            return web.Response(status=503)

        runner, url = await serve(handler)
        async with ClientSession() as session, session.get(url) as response:
            assert response.status == 503
        await runner.cleanup()

    asyncio.run(scenario())


def test_slow_reader_holds_the_writer_and_one_that_goes_ends_it():
    async def scenario():
        sent = 0
        ended = asyncio.get_running_loop().create_future()

        async def handler(request):
            nonlocal sent
            stream = EventStream(request, 5)
            try:
                while True:
                    await stream.data(b"x" * 65536)
                    sent += 65536
            except ConnectionResetError as error:
                ended.set_result(error)
                raise

        runner, url = await serve(handler)
        session = ClientSession()
        response = await session.get(url)
        await asyncio.sleep(0.3)
        stuck_at = sent
        await asyncio.sleep(0.3)
        assert sent == stuck_at
        assert stuck_at < 64 * 2**20
        response.close()
        with pytest.raises(ConnectionResetError):
            raise await asyncio.wait_for(ended, 5)
        await session.close()
        await runner.cleanup()

    asyncio.run(scenario())


@pytest.mark.parametrize("whole", [False, True])
def test_a_reader_that_reads_nothing_is_dropped(whole):
    """Before all is sent, and without more of it in memory than the connection's buffer holds."""

    async def scenario():
        ended = asyncio.get_running_loop().create_future()
        sent = 0

        async def handler(request):
            nonlocal sent
            stream = EventStream(request, 0.2)
            try:
                if whole:
                    return await send_json(request, b"x" * 2**27, 0.2, {})
                while True:
                    await stream.data(b"x" * 65536)
                    sent += 65536
            except ConnectionResetError as error:
                ended.set_result((error, request.transport))
                raise

        runner, url = await serve(handler)
        async with ClientSession() as session, session.get(url):
            error, transport = await asyncio.wait_for(ended, 10)
            assert "read nothing for 0.2 s" in str(error)
            assert transport is None or transport.is_closing()
            assert sent < 64 * 2**20
        await runner.cleanup()

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES + 7])
def test_a_whole_answer_of_any_size(size):
    async def scenario():
        async def handler(request):
            return await send_json(request, b"x" * size, 5, {"X-Request-Id": "r1"})

        runner, url = await serve(handler)
        async with ClientSession() as session, session.get(url) as response:
            assert await response.read() == b"x" * size
            assert (response.content_type, response.headers["X-Request-Id"]) == ("application/json", "r1")
            assert int(response.headers["Content-Length"]) == size
        await runner.cleanup()

    asyncio.run(scenario())
