"""What the router costs a request and a token, and how that grows with the streams that are open.

    python bench/door.py [--quick] [--json FILE] [--rounds N] [--seed N]

The real router and a real store node, before workers that compute nothing (door_stub.py). CPU time is that of the
router's process alone, by its CPU clock, so other work on the machine changes it little. The limit, in the same run: a
relay of the same HTTP and gRPC libraries with nothing between them (door_relay.py). Peer of the time added to the first
token: the decode stub called directly over gRPC. Medians of all rounds; ratios first.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import secrets
import string
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import grpc
from direct import DirectDecode
from door_client import Clients
from door_figures import STREAMS, show, summarise
from door_servers import Servers

from kvferry.cli.models import resolve
from kvferry.common.proto import worker_pb2 as pb
from kvferry.router.text import Tokenizer, load_tokenizer

MODEL = "demo"  # a byte is a token
LONG, SHORT = 12_000, 32  # tokens of a prompt, with the one that begins it
ANSWER = 2  # tokens of an answer: the first is prefill's, the second decode's
STEPS = {1: (256, 4_000), 64: (48, 50_000), 1000: (4, 1_500_000)}  # that are measured, and the gap between them in us
IN_A_ROW = 20  # requests of a kind, in a round
ENDLESS = 16_000  # tokens of an answer that goes on for longer than is measured
BURST, AT_ONCE = 256, 64  # short requests that tell how many a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under 120 s on two cores")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    print(f"seed {args.seed}")
    started = time.monotonic()
    seen = asyncio.run(measure(rounds, random.Random(args.seed)))
    figures = summarise(seen)
    show(figures, LONG, rounds)
    if args.json:
        machine = {
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
            "python": sys.version.split()[0],
        }
        told = {"seed": args.seed, "rounds": rounds, "seconds": round(time.monotonic() - started)}
        args.json.write_text(json.dumps({**figures, "run": told | machine}, indent=2) + "\n")


async def measure(rounds: int, rng: random.Random) -> dict[str, list[float]]:
    """What was seen, a value a round: seconds, and MiB."""
    model = resolve(MODEL)[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="door-")))
        bench = Bench(Servers(MODEL, model, STREAMS[-1], folder, stack), load_tokenizer(model), rng)
        await bench.direct.start()
        await bench.warm_up()
        await bench.memory()
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            await bench.requests()
            for streams in STREAMS:
                await bench.beside(streams)
                await bench.tokens(streams)
        await bench.memory_again()
        await bench.direct.close()
        return bench.seen


class Bench:
    """`seen`: what was measured so far."""

    def __init__(self, servers: Servers, tokenizer: Tokenizer, rng: random.Random):
        self._servers, self._tokenizer, self._rng = servers, tokenizer, rng
        self._router, self._relay = Clients(servers.router, MODEL), Clients(servers.relay, MODEL)
        self.direct = Direct(servers.decode)
        self.seen: dict[str, list[float]] = {}

    def _note(self, name: str, value: float) -> None:
        self.seen.setdefault(name, []).append(value)

    def _texts(self, length: int, count: int) -> list[str]:
        """Prompts that nobody has sent before."""
        words = string.ascii_letters + " "
        return ["".join(self._rng.choices(words, k=length - 1)) for _ in range(count)]

    async def warm_up(self) -> None:
        for clients in (self._router, self._relay):
            await clients.ask(self._texts(LONG, IN_A_ROW), ANSWER)
            await clients.ask(self._texts(SHORT, BURST), 1, AT_ONCE)
        for prompt in self._texts(SHORT, IN_A_ROW):
            await self.direct.first_token_s(prompt)

    async def memory(self) -> None:
        """First of all: what a process has once taken it keeps."""
        held = 0
        self._note("memory_0", self._servers.router.memory_mib())
        for streams in STREAMS:
            await self._router.hold(self._texts(SHORT, streams - held), ANSWER)
            held = streams
            self._note(f"memory_{streams}", self._servers.router.memory_mib())
        await self._let_go()

    async def memory_again(self) -> None:
        await self._router.hold(self._texts(SHORT, STREAMS[-1]), ANSWER)
        self._note("memory_again", self._servers.router.memory_mib())
        await self._let_go()

    async def _let_go(self) -> None:
        self._router.drop()
        await self._servers.until_idle()

    async def requests(self) -> None:
        """The limit of a request, the same prompts as token ids, and how many requests there can be."""
        texts = self._texts(LONG, IN_A_ROW)
        self._note("relay_request", (await self._relay.ask(texts, ANSWER)).cpu_s / IN_A_ROW)
        ids = [list(text.encode()) for text in self._texts(LONG, IN_A_ROW)]
        self._note("ids_request", (await self._router.ask(ids, ANSWER)).cpu_s / IN_A_ROW)
        for name, clients in (("router", self._router), ("relay", self._relay)):
            burst = await clients.ask(self._texts(SHORT, BURST), 1, AT_ONCE)
            self._note(f"{name}_short", burst.cpu_s / BURST)
            self._note(f"{name}_per_s", BURST / burst.wall_s)

    async def beside(self, streams: int) -> None:
        """Requests one after the other, while so many streams are open and get nothing."""
        await self._router.hold(self._texts(SHORT, streams), ANSWER)
        texts = self._texts(LONG, IN_A_ROW)
        self._note(f"request_{streams}", (await self._router.ask(texts, ANSWER)).cpu_s / IN_A_ROW)
        started = time.process_time()
        for text in texts:
            self._tokenizer.encode_now(text)
        self._note("tokenising", (time.process_time() - started) / IN_A_ROW)
        through, straight = [], []
        for prompt in self._texts(SHORT, IN_A_ROW):
            through += (await self._router.ask([prompt], 1)).ttft_s
            straight.append(await self.direct.first_token_s(prompt))
        self._note(f"added_{streams}", median(through) - median(straight))
        self._note(f"direct_{streams}", median(straight))
        await self._let_go()

    async def tokens(self, streams: int) -> None:
        """CPU time for a token, while so many streams get theirs."""
        steps, gap_us = STEPS[streams]
        for name, clients in (("router", self._router), ("relay", self._relay)):
            if clients is self._relay and streams != AT_ONCE:
                continue
            await clients.hold(self._texts(SHORT, streams), ENDLESS, gap_us)
            self._note(f"{name}_token_{streams}", await clients.cpu_per_token(steps, gap_us))
            clients.drop()
        await self._servers.until_idle()


class Direct:
    """The decode stub, called over gRPC without the router."""

    def __init__(self, address: str):
        self._channel = grpc.aio.insecure_channel(address)
        self._decode = DirectDecode(self._channel)

    async def start(self) -> None:
        await self._decode.start()

    async def first_token_s(self, prompt: str) -> float:
        started, elapsed = time.perf_counter(), None
        sequence = pb.Sequence(token_ids=prompt.encode(), sampling=pb.Sampling(max_tokens=1))
        async for _ in self._decode.tokens(sequence):
            elapsed = time.perf_counter() - started
        if elapsed is None:
            raise SystemExit("decode gave no token")
        return elapsed

    async def close(self) -> None:
        await self._decode.close()
        await self._channel.close()


if __name__ == "__main__":
    main()
