"""How fast one engine decodes and prefills on this machine's CPU, against transformers and against memory.

    python bench/engine.py [--quick] [--json FILE] [--threads N]

A 100M-parameter Llama, made on the spot, in fp32, and the headline again in bf16 (figures marked bf16_). Nine settings
of batch and context, or with --quick two, against generate_batch in the shorter one only. Peers in the
same run, interleaved, same dtype and threads: transformers' `generate` (static batch) and its continuous batching
(`generate_batch`, where it can run in time); decode is compared to the better of the two. The limit is what a read-only
stream takes over the weights and the KV of one step. Medians; ratios count, the rest describes this machine.

Decoding begins at contexts that are there already, of random numbers: in the page pool as if pulled, in transformers'
cache as if computed (not in `generate_batch`, which computes them, off the clock). Each side and dtype has a process of
its own, so that no OpenMP threads but its own stand in its way.
"""

import argparse
import asyncio
import dataclasses
import json
import math
import multiprocessing
import os
import platform
import random
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TypeVar

import torch
from engine_peers import Peers, forward_seconds, generate_batch_tokens_per_s, generate_step_seconds, read_bytes_per_s
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from kvferry.common.config import EngineConfig
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Outcome, StepPlan
from kvferry.engine.engine import Engine
from kvferry.engine.loading.model import LoadedModel, load_model
from kvferry.engine.sequence import Sequence, TokenEvent

Result = TypeVar("Result")

VOCAB = 32000
LONGEST = 4096 + 512
BATCHES, CONTEXTS = (1, 8, 32), (32, 1024, 4096)
HEADLINE = (8, 1024)
SHORT = (8, 32)
PREFILL = 1024
CHUNK = 1024  # tokens of a step
MOST_FOR_GENERATE_BATCH = 1024  # prompt tokens; it takes minutes beyond, so there only the headline, in a full run
MANY_TOKENS = 2**16  # a setting with more prompt tokens is measured once, not in every round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="decode steps a setting and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the headline settings only: under 240 s on two cores")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    args = parser.parse_args()
    print(f"seed {args.seed}")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        alone(make_model, Path(folder), args.seed)
        full = [HEADLINE, SHORT] if args.quick else [(b, c) for b in BATCHES for c in CONTEXTS]
        figures = apart(measure, Path(folder), args, "float32", full)
        figures |= apart(scheduler_figures, Path(folder), args)
        beside = apart(measure, Path(folder), args, "bfloat16", [HEADLINE, SHORT])
        figures |= {f"bf16_{name}": value for name, value in beside.items()}
    show(figures)
    if args.json:
        run = {"seed": args.seed, "threads": args.threads, "rounds": args.rounds, "quick": args.quick}
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**figures, "run": run | machine}, indent=2) + "\n")


def make_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=LONGEST, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def alone(work: Callable[..., Result], *args: object) -> Result:
    """`work(*args)` on a thread that is gone afterwards, and its OpenMP workers with it. libgomp stops spinning at
    barriers once a process keeps more such threads than it has cores, and every step is slower for it."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(work(*args)))
    thread.start()
    thread.join()
    return results[0]


def apart(work: Callable[..., Result], *args: object) -> Result:
    """`work(*args)` in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *args).result()


def engine_config(folder: Path, args: argparse.Namespace, dtype: str) -> EngineConfig:
    return EngineConfig(
        model=str(folder), dtype=dtype, device="cpu", threads=args.threads, max_num_batched_tokens=CHUNK,
        max_num_seqs=256, kv_cache_bytes=4 * 2**30,
    )  # fmt: skip


def measure(folder: Path, args: argparse.Namespace, dtype: str, settings: list[tuple[int, int]]) -> dict[str, float]:
    rng = random.Random(args.seed)
    peers = Peers(folder, dtype, args.threads)
    config = engine_config(folder, args, dtype)
    model = alone(load_model, config, lambda *_: None)
    values = sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    weights = values * getattr(torch, dtype).itemsize
    rounds = 2 if args.quick else args.rounds
    seen: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(length)]

    for batch, context in settings:
        prompts = [prompt(context) for _ in range(batch)]
        kv = batch * context * model.layout.block_bytes / model.layout.block_size
        at = f"b{batch}_c{context}"
        short = batch * context <= MOST_FOR_GENERATE_BATCH or ((batch, context) == HEADLINE and not args.quick)
        for number in range(rounds if batch * context <= MANY_TOKENS else 1):
            note(f"engine_{at}", batch / engine_step_seconds(model, config, prompts, args.steps))
            note(f"generate_{at}", batch / peers.ask(generate_step_seconds, prompts, args.steps))
            note(f"limit_{at}", batch / ((weights + kv) / peers.ask(read_bytes_per_s)))
            if short and (number == 0 or (batch, context) != HEADLINE):  # there it takes minutes
                note(f"generate_batch_{at}", peers.ask(generate_batch_tokens_per_s, prompts, args.steps))
        names = [f"{who}_{at}" for who in ("engine", "generate", "generate_batch", "limit")]
        told = ", ".join(f"{name.rpartition('_b')[0]} {median(seen[name]):.1f}" for name in names if name in seen)
        print(f"{dtype} batch {batch} context {context}, tokens/s: {told}", flush=True)
    prefilling = Prefilling(model, config, prompt(PREFILL))
    for _ in range(2 * rounds + 1):
        some = prompt(PREFILL)
        note("prefill_engine_s", prefilling.seconds(some))
        note("prefill_transformers_s", peers.ask(forward_seconds, some))
    prefilling.close()
    peers.close()
    return summarise(seen, settings)


def summarise(seen: dict[str, list[float]], settings: list[tuple[int, int]]) -> dict[str, float]:
    def ratio(over: str, under: str) -> float:
        """Median of the rounds' own ratios: both sides of a round saw the same machine."""
        return median(a / b for a, b in zip(seen[over], seen[under], strict=True))

    def over_transformers(at: str) -> float:
        over = ratio(f"engine_{at}", f"generate_{at}")
        other = seen.get(f"generate_batch_{at}")
        return over if other is None else min(over, median(seen[f"engine_{at}"]) / median(other))

    places = {setting: "b{}_c{}".format(*setting) for setting in settings}
    compared = {at: over_transformers(at) for at in places.values()}
    figures = {
        "decode_over_transformers": compared[places[HEADLINE]],
        "decode_over_transformers_min": min(compared.values()),
        "decode_over_limit": ratio(f"engine_{places[HEADLINE]}", f"limit_{places[HEADLINE]}"),
        "prefill_over_transformers": ratio("prefill_transformers_s", "prefill_engine_s"),
    }
    for at in places.values():
        figures[f"over_transformers_{at}"] = compared[at]
        figures[f"over_limit_{at}"] = ratio(f"engine_{at}", f"limit_{at}")
    return figures | {name: median(values) for name, values in seen.items()}


def new_scope(engine: Engine) -> CacheScope:
    keys = TenantKeys.derive(secrets.token_bytes(32), "bench", secrets.token_bytes(32))
    return CacheScope(keys, engine.model.fingerprint, engine.model.layout)


async def drive(
    engine: Engine, prompts: list[list[int]], new_tokens: int, told: bool = True, there: bool = False
) -> list[list[float]]:
    """Generate for all prompts at once; the moment of each token, by prompt, if they are to be `told`. `there`: their
    KV is in the pool, whatever it holds."""
    scope, params = new_scope(engine), SamplingParams(max_tokens=new_tokens, temperature=0)

    async def restore(seq: Sequence) -> None:
        if there:
            seq.num_computed = seq.reuse_cap * seq.block_size

    async def one(prompt: list[int]) -> list[float]:
        moments: list[float] = []

        def take(event: TokenEvent) -> None:
            if event.token is not None:
                moments.append(time.perf_counter())

        seq = engine.new_sequence("bench", scope, prompt, len(prompt), params, new_tokens)
        await engine.generate(seq, restore, take if told else lambda event: None)
        return moments

    loop = asyncio.create_task(engine.run())
    moments = await asyncio.gather(*(one(prompt) for prompt in prompts))
    engine.stop()
    await loop
    return moments


def engine_step_seconds(model: LoadedModel, config: EngineConfig, prompts: list[list[int]], steps: int) -> float:
    """Median step with all prompts decoding."""
    engine = Engine(model, config)
    blocks = len(prompts) * (-(-len(prompts[0]) // config.block_size))
    for some in engine.memory.tensor[: blocks + len(prompts)].split(256):
        some.normal_()
    extra = 4  # a step may compute some prompts' last tokens only
    moments = asyncio.run(drive(engine, prompts, steps + extra, there=True))
    begun, ended = max(row[0] for row in moments), min(row[-1] for row in moments)
    own = [m for m in moments[-1] if begun <= m <= ended]
    assert len(own) > steps, "all prompts decode for as many steps as are measured"
    return median(late - early for early, late in pairwise(own[: steps + 1]))


class Prefilling:
    """An engine that has been running, and is asked for one prompt's first token at a time."""

    def __init__(self, model: LoadedModel, config: EngineConfig, before: list[int]):
        self._engine = Engine(model, config)
        self._scope = new_scope(self._engine)
        self._loop = asyncio.new_event_loop()
        self._running = self._loop.create_task(self._engine.run())
        self.seconds(before)

    def seconds(self, prompt: list[int]) -> float:
        return self._loop.run_until_complete(self._seconds(prompt))

    async def _seconds(self, prompt: list[int]) -> float:
        async def nothing_stored(_: Sequence) -> None:
            return

        started = time.perf_counter()
        params = SamplingParams(max_tokens=1, temperature=0)
        seq = self._engine.new_sequence("bench", self._scope, prompt, len(prompt), params, 1)
        await self._engine.generate(seq, nothing_stored, lambda event: None)
        return time.perf_counter() - started

    def close(self) -> None:
        self._engine.stop()
        self._loop.run_until_complete(self._running)
        self._loop.close()


class NoModel:
    """Stands where the model was, and takes no time: the logits it gives are there already."""

    def __init__(self, rows: int, vocab: int):
        self._logits = torch.zeros(1, rows, vocab)

    def __call__(self, *, logits_to_keep: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self._logits[:, : len(logits_to_keep)])


def scheduler_us(model: LoadedModel, config: EngineConfig, running: int, vocab: int, steps: int = 200) -> float:
    """CPU time that a step of so many decoding sequences takes outside the model, on the event loop's thread and on the
    step's: scheduling, block tables, inputs, the choice of tokens out of `vocab`, telling streams that do nothing with
    it. (The attention's own look at block tables counts as the model's.) Median of the steps."""
    engine = Engine(dataclasses.replace(model, module=NoModel(running, vocab)), config)
    execute, loop_clock = engine._runner.execute, time.pthread_getcpuclockid(threading.get_ident())
    loop_at: list[float] = []
    spent: list[float] = []

    def timed_execute(plan: StepPlan) -> Outcome:
        full = len(plan.seq_ids) == len(plan.token_ids) == running
        loop_at.append(time.clock_gettime(loop_clock) if full else math.nan)
        started = time.thread_time()
        outcome = execute(plan)
        spent.append(time.thread_time() - started if full else math.nan)
        return outcome

    engine._runner.execute = timed_execute
    prompts = [[i % VOCAB + 1] * 4 for i in range(running)]
    asyncio.run(drive(engine, prompts, steps, told=False))
    steps_us = [
        (later - earlier + beside) * 1e6 for (earlier, later), beside in zip(pairwise(loop_at), spent, strict=False)
    ]
    return median(value for value in steps_us if not math.isnan(value))


def scheduler_figures(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    config = engine_config(folder, args, "float32")
    model = alone(load_model, config, lambda *_: None)
    few, many = (median(scheduler_us(model, config, running, 8) for _ in range(3)) for running in (16, 256))
    choosing = scheduler_us(model, config, 256, VOCAB) - many
    return {
        "scheduler_us": many,
        "scheduler_us_16": few,
        "scheduler_growth_16_to_256": many / few,
        "choosing_from_32000_us": choosing,
    }


TARGETS = {
    "decode_over_transformers": "at least 2",
    "decode_over_transformers_min": "at least 1.0",
    "decode_over_limit": "aim at 0.6",
    "prefill_over_transformers": "at least 0.95",
    "scheduler_us": "at most 300",
}


def show(figures: dict[str, float]) -> None:
    table = Table(title="engine: 100M Llama, tokens/s, seconds and ratios; medians", title_justify="left")
    for name, justify in (("figure", "left"), ("value", "right"), ("target", "left")):
        table.add_column(name, justify=justify)
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}" if value < 10 else f"{value:.1f}", TARGETS.get(name, ""))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
