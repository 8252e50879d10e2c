"""What a hand-over costs and what reuse saves, through the whole system, on this machine.

    python bench/serving.py [--quick] [--json FILE] [--model demo] [--prompt 2048] [--threads N]

Peers in the same run, interleaved: the same engine doing prefill and decode in one process (no hand-over); the
services called directly over gRPC (no router); transformers computing the same prompt (no server at all); and the limit
of a pull, a plain copy of as many bytes. Medians; ratios count, milliseconds only describe this machine at this moment.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import secrets
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import grpc
import httpx
import numpy as np
import torch
from direct import DirectDecode
from rich.console import Console
from rich.table import Table
from system import System, Timed, ask, system
from transformers import AutoModelForCausalLM

from kvferry.cli.models import resolve
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.sampling import SamplingParams
from kvferry.common.wire import layout_from_wire, sequence_to_wire

SHORT = 32  # tokens of the prompt that measures the router
STEPS = 12  # tokens generated behind the hand-over
FILLERS = 3  # prompts that push the measured one out of decode's page pool
BLOCK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, a folder, or a Hugging Face id")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the long prompts")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under 240 s on two cores")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of a worker")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    args = parser.parse_args()
    rounds = 5 if args.quick else args.rounds
    print(f"seed {args.seed}")
    seen = measure(args.model, args.prompt, rounds, args.threads, random.Random(args.seed))
    figures = summarise(seen)
    show(figures, args.prompt, rounds)
    if args.json:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "torch": torch.__version__}
        told = {"seed": args.seed, "prompt_tokens": args.prompt, "rounds": rounds, "threads": args.threads}
        args.json.write_text(json.dumps({**figures, "run": told | machine}, indent=2) + "\n")


def measure(model: str, length: int, rounds: int, threads: int, rng: random.Random) -> dict[str, list[float]]:
    """Seconds by what was measured, one value a round."""
    blocks = -(-length // BLOCK)
    pool = 2 * blocks + 16  # two long prompts fit into decode's page pool, three do not
    prompt = lambda size: [rng.randrange(256) for _ in range(size)]  # noqa: E731
    seen: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)

    torch.set_num_threads(threads)
    oracle = AutoModelForCausalLM.from_pretrained(resolve(model)[0], dtype=torch.float32).eval()
    with ExitStack() as stack:
        common = (f"--threads={threads}", "--store-size=2GiB", "--dtype=float32")
        apart = stack.enter_context(
            system(model, "--prefill=1", "--decode=1", f"--decode-arg=--num-gpu-blocks-override={pool}", *common)
        )
        single = stack.enter_context(
            system(model, "--prefill=0", "--decode=1", f"--max-local-prefill-length={2**20}", *common)
        )
        http = stack.enter_context(httpx.Client())
        direct = stack.enter_context(Direct(apart))
        ask(http, apart, prompt(length), STEPS), ask(http, single, prompt(length), STEPS)  # first touches
        for _ in range(rounds):
            measured = prompt(length)
            cold = ask(http, apart, measured, STEPS)
            require(cold, reused=0)
            note("cold", cold.ttft)
            note("step", median(cold.gaps[1:]))
            note("handover", cold.gaps[0] - median(cold.gaps[1:]))
            note("cold_single", require(ask(http, single, measured, STEPS), reused=0).ttft)
            note("transformers", forward_seconds(oracle, measured))
            for _ in range(FILLERS):
                ask(http, apart, prompt(length), 2)
            note("warm_host", require(ask(http, apart, measured, STEPS), tier="host", length=length).ttft)
            note("warm_gpu", require(ask(http, apart, measured, STEPS), tier="gpu", length=length).ttft)
            note("copy", copy_seconds(direct.block_bytes * ((length - 1) // BLOCK)))
            for _ in range(5):
                note("short_router", ask(http, apart, prompt(SHORT), 1).ttft)
                note("short_direct", direct.first_token_seconds(prompt(SHORT)))
    return seen


def require(timed: Timed, reused: int | None = None, tier: str = "", length: int = 0) -> Timed:
    """The answer, if it was served as the measurement means it to be."""
    took = timed.usage["kvferry"]["reused"]
    meant = {"gpu": 0, "host": 0} if reused == 0 else {"gpu": 0, "host": 0, tier: (length - 1) // BLOCK * BLOCK}
    if took != meant:
        raise SystemExit(f"a request reused {took}, and the measurement means {meant}")
    return timed


@torch.inference_mode()
def forward_seconds(oracle: torch.nn.Module, prompt: list[int]) -> float:
    started = time.perf_counter()
    oracle(torch.tensor([prompt]), logits_to_keep=1).logits.argmax()
    return time.perf_counter() - started


def copy_seconds(size: int) -> float:
    """The limit of a pull: as many bytes copied in memory that was touched before."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    started = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - started


class Direct:
    """The decode service of a system, called over its own socket, without the router."""

    def __init__(self, behind: System):
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._channel = grpc.aio.insecure_channel(behind.argument("decode", "listen"))
        self._decode = DirectDecode(self._channel)
        self._loop.run_until_complete(self._decode.start())
        self._status: pb.WorkerStatus = self._loop.run_until_complete(self._watch())
        keys = TenantKeys.derive(secrets.token_bytes(32), "bench", secrets.token_bytes(32))
        self._scope = CacheScope(keys, self._status.fingerprint, layout_from_wire(self._status.layout))

    @property
    def block_bytes(self) -> int:
        return self._scope.layout.block_bytes

    async def _watch(self) -> pb.WorkerStatus:
        call = self._decode.stub.Watch(pb.WatchRequest())
        status = await call.read()
        call.cancel()
        await call.code()
        return status

    def first_token_seconds(self, prompt: list[int]) -> float:
        return self._loop.run_until_complete(self._first_token(prompt))

    async def _first_token(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        sequence = sequence_to_wire("bench", self._scope, prompt, len(prompt), params)
        elapsed = None
        async for _ in self._decode.tokens(sequence):
            elapsed = time.perf_counter() - started
        if elapsed is None:
            raise SystemExit("decode gave no token")
        return elapsed

    def __enter__(self) -> "Direct":
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._decode.close())
        self._loop.run_until_complete(self._channel.close())
        self._loop.close()


def summarise(seen: dict[str, list[float]]) -> dict[str, float]:
    def ratio(over: str, under: str) -> float:
        """Median of the rounds' own ratios: both sides of a round saw the same machine."""
        return median(a / b for a, b in zip(seen[over], seen[under], strict=True))

    middle = {name: median(values) for name, values in seen.items()}
    return {
        "ttft_warm_over_cold": ratio("warm_host", "cold"),
        "ttft_warm_gpu_over_cold": ratio("warm_gpu", "cold"),
        "disaggregated_over_single_ttft": ratio("cold", "cold_single"),
        "ttft_cold_over_transformers": ratio("cold", "transformers"),
        "handover_ms": middle["handover"] * 1e3,
        "router_overhead_ms": (middle["short_router"] - middle["short_direct"]) * 1e3,
        "warm_over_copy": ratio("warm_host", "copy"),
        **{f"{name}_ms": value * 1e3 for name, value in middle.items() if name != "handover"},
    }


TARGETS = {"ttft_warm_over_cold": "at most 0.2"}
MEANING = {
    "ttft_warm_over_cold": "prefix pulled from the store, against computing it",
    "ttft_warm_gpu_over_cold": "prefix in decode's page pool, against computing it",
    "disaggregated_over_single_ttft": "prefill on another process, against one engine for both",
    "ttft_cold_over_transformers": "first token through the system, against transformers' bare forward",
    "handover_ms": "gap between first and second token beyond a normal step",
    "router_overhead_ms": "p50 first token of a short prompt: through HTTP less gRPC to decode",
    "warm_over_copy": "pulled TTFT, against a bare copy of the same bytes",
    "cold_ms": "TTFT, nothing cached, prefill and decode apart",
    "cold_single_ms": "TTFT, nothing cached, one engine",
    "warm_host_ms": "TTFT, prefix pulled from the store",
    "warm_gpu_ms": "TTFT, prefix in decode's page pool",
    "transformers_ms": "one forward of the prompt by transformers",
    "copy_ms": "copying the prefix's bytes",
    "step_ms": "one decode step",
    "short_router_ms": f"first token of {SHORT} tokens through the router",
    "short_direct_ms": f"first token of {SHORT} tokens, decode called directly",
}


def show(figures: dict[str, float], length: int, rounds: int) -> None:
    table = Table(title=f"serving: {length} prompt tokens, medians of {rounds} rounds", title_justify="left")
    for name, justify in (("figure", "left"), ("value", "right"), ("target", "left"), ("what", "left")):
        table.add_column(name, justify=justify)
    for name, meaning in MEANING.items():
        table.add_row(name, f"{figures[name]:.3f}", TARGETS.get(name, ""), meaning)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
