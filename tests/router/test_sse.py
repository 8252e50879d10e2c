"""Event streams over a real aiohttp server."""

import asyncio

import pytest
from aiohttp import ClientSession, web

from kvferry.router.sse import EventStream


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
