"""The limit of the router, for bench/door.py: the same HTTP and gRPC libraries with nothing between them.

    python bench/door_relay.py PORT PREFILL_ADDRESS DECODE_ADDRESS

Each byte of a prompt is a token. No keys, checks, limits, names, stop strings, failover or accounts. A prompt of more
than 64 tokens is filled by prefill. Ends when its stdin does.
"""

import asyncio
import json
import sys

import grpc
from aiohttp import web
from direct import DirectDecode

from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import PrefillStub
from kvferry.common.wire import CHANNEL_OPTIONS

LOCAL = 64


class Relay:
    def __init__(self, prefill: str, decode: str):
        self._prefill = PrefillStub(grpc.aio.insecure_channel(prefill, options=CHANNEL_OPTIONS))
        self._decode = DirectDecode(grpc.aio.insecure_channel(decode, options=CHANNEL_OPTIONS))

    async def start(self) -> None:
        await self._decode.start()

    async def ready(self, request: web.Request) -> web.Response:
        return web.Response()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.read())
        sampling = pb.Sampling(max_tokens=asked["max_tokens"], seed=asked["seed"])
        sequence = pb.Sequence(request_id="r", token_ids=asked["prompt"].encode(), sampling=sampling)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        fills = len(sequence.token_ids) > LOCAL
        call, events, told = self._decode.call()
        await call.write(pb.ContinueCommand(open=pb.ContinueOpen(sequence=sequence, expects_fill=fills, **told)))
        if fills:
            first = await self._fill(sequence, call)
            await response.write(event_of(first))
        while not (event := await events.get()).HasField("finished"):
            if event.HasField("tokens"):
                await response.write(event_of(event.tokens.token_ids[0]))
                if event.tokens.finish_reason:
                    await response.write(event_of(None))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _fill(self, sequence: pb.Sequence, call: grpc.aio.StreamUnaryCall) -> int:
        """Have it filled, each report relayed; the first token."""
        fill = self._prefill.Fill()
        await fill.write(pb.FillCommand(open=sequence))
        await fill.done_writing()
        while (report := await fill.read()) is not grpc.aio.EOF:
            progress = pb.FillProgress(
                committed_blocks=report.committed_blocks, first_tokens=report.first_tokens, done=report.done
            )
            await call.write(pb.ContinueCommand(progress=progress))
        return progress.first_tokens[0].token_id


def event_of(token: int | None) -> bytes:
    text = "" if token is None else chr(token)
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"


async def serve(port: str, prefill: str, decode: str) -> None:
    relay = Relay(prefill, decode)
    await relay.start()
    app = web.Application()
    app.router.add_get("/ready", relay.ready)
    app.router.add_post("/v1/completions", relay.complete)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(port)).start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
