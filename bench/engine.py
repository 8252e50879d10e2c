"""How fast one engine decodes and prefills on this machine's CPU, against transformers and against memory.

    python bench/engine.py [--quick] [--json FILE] [--threads N] [--dtype float32]

A 100M-parameter Llama, made on the spot. Peers in the same run, interleaved, same dtype and threads: transformers'
`generate` (static batch) and, at short settings, its continuous batching (`generate_batch`); the limit is what a
read-only stream takes over the weights and the KV of one step. Medians; ratios count, the rest describes this machine.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import secrets
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from kvferry.common.config import EngineConfig
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import StepPlan
from kvferry.engine.engine import Engine
from kvferry.engine.model import LoadedModel, load_model
from kvferry.engine.sequence import Sequence

VOCAB = 32000
LONGEST = 4096 + 64
BATCHES, CONTEXTS = (1, 8, 32), (32, 1024, 4096)
HEADLINE = (8, 1024)
PREFILL = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
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
        make_model(Path(folder), args.seed)
        figures = measure(Path(folder), args)
    show(figures, args.dtype)
    if args.json:
        run = {"seed": args.seed, "dtype": args.dtype, "threads": args.threads, "rounds": args.rounds}
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


def measure(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    rng = random.Random(args.seed)
    dtype = getattr(torch, args.dtype)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    config = EngineConfig(
        model=str(folder), dtype=args.dtype, device="cpu", threads=args.threads, max_num_batched_tokens=1024,
        max_num_seqs=256, kv_cache_bytes=4 * 2**30,
    )  # fmt: skip
    model = load_model(config, lambda *_: None)
    weights = sum(p.numel() for p in peer.parameters()) * dtype.itemsize
    settings = [HEADLINE, (8, 32)] if args.quick else [(b, c) for b in BATCHES for c in CONTEXTS]
    rounds = 2 if args.quick else args.rounds
    seen: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)

    for batch, context in settings:
        prompts = [[rng.randrange(VOCAB) for _ in range(context)] for _ in range(batch)]
        kv = batch * context * model.layout.block_bytes / model.layout.block_size
        for _ in range(rounds):
            at = f"b{batch}_c{context}"
            note(f"engine_{at}", batch / engine_step_seconds(model, config, prompts, args.steps))
            note(f"generate_{at}", batch / generate_step_seconds(peer, prompts, args.steps))
            note(f"limit_{at}", batch / ((weights + kv) / read_bytes_per_s()))
    at = "b{}_c{}".format(*HEADLINE)
    prompts = [[rng.randrange(VOCAB) for _ in range(32)] for _ in range(8)]
    note("generate_batch_b8_c32", generate_batch_tokens_per_s(peer, prompts, args.steps))
    prompt = [rng.randrange(VOCAB) for _ in range(PREFILL)]
    for _ in range(2 * rounds + 1):
        note("prefill_engine_s", prefill_seconds(model, config, prompt))
        note("prefill_transformers_s", forward_seconds(peer, prompt))
    for running in (16, 256):
        note(f"scheduler_us_{running}", scheduler_us(model, config, running))
    return summarise(seen, settings, at)


def summarise(seen: dict[str, list[float]], settings: list[tuple[int, int]], at: str) -> dict[str, float]:
    def ratio(over: str, under: str) -> float:
        """Median of the rounds' own ratios: both sides of a round saw the same machine."""
        return median(a / b for a, b in zip(seen[over], seen[under], strict=True))

    places = [f"b{batch}_c{context}" for batch, context in settings]
    figures = {
        "decode_over_transformers": ratio(f"engine_{at}", f"generate_{at}"),
        "decode_over_transformers_min": min(ratio(f"engine_{p}", f"generate_{p}") for p in places),
        "decode_over_generate_batch": median(seen["engine_b8_c32"]) / median(seen["generate_batch_b8_c32"]),
        "decode_over_limit": ratio(f"engine_{at}", f"limit_{at}"),
        "prefill_over_transformers": ratio("prefill_transformers_s", "prefill_engine_s"),
        "scheduler_us": median(seen["scheduler_us_256"]),
        "scheduler_growth_16_to_256": median(seen["scheduler_us_256"]) / median(seen["scheduler_us_16"]),
    }
    for place in places:
        figures[f"over_transformers_{place}"] = ratio(f"engine_{place}", f"generate_{place}")
        figures[f"over_limit_{place}"] = ratio(f"engine_{place}", f"limit_{place}")
    return figures | {name: median(values) for name, values in seen.items()}


async def drive(engine: Engine, model: LoadedModel, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
    """Generate for all prompts at once; the moment of each token, by prompt."""
    keys = TenantKeys.derive(secrets.token_bytes(32), "bench", secrets.token_bytes(32))
    scope = CacheScope(keys, model.fingerprint, model.layout)
    params = SamplingParams(max_tokens=new_tokens, temperature=0)

    async def nothing_stored(_: Sequence) -> None:
        return

    async def one(prompt: list[int]) -> list[float]:
        seq = engine.new_sequence("bench", scope, prompt, len(prompt), params, new_tokens)
        return [time.perf_counter() async for step in engine.generate(seq, nothing_stored) if step.token is not None]

    loop = asyncio.create_task(engine.run())
    moments = await asyncio.gather(*(one(prompt) for prompt in prompts))
    engine.stop()
    await loop
    return moments


def engine_step_seconds(model: LoadedModel, config: EngineConfig, prompts: list[list[int]], steps: int) -> float:
    """Median decode step once every prompt is computed."""
    moments = asyncio.run(drive(Engine(model, config), model, prompts, steps + 8 * len(prompts)))
    begun = max(row[0] for row in moments)
    longest = max(moments, key=lambda row: sum(moment > begun for moment in row))
    return median(late - early for early, late in pairwise([m for m in longest if m >= begun][: steps + 1]))


def prefill_seconds(model: LoadedModel, config: EngineConfig, prompt: list[int]) -> float:
    engine = Engine(model, config)
    started = time.perf_counter()
    return asyncio.run(drive(engine, model, [prompt], 1))[0][0] - started


class Moments(LogitsProcessor):
    """Notes when each step of `generate` has its logits."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at.append(time.perf_counter())
        return scores


@torch.inference_mode()
def generate_step_seconds(peer: LlamaForCausalLM, prompts: list[list[int]], steps: int) -> float:
    moments = Moments()
    tokens = torch.tensor(prompts)
    peer.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=steps + 1, do_sample=False, pad_token_id=0,
        logits_processor=[moments],
    )  # fmt: skip
    return median(late - early for early, late in pairwise(moments.at))


def generate_batch_tokens_per_s(peer: LlamaForCausalLM, prompts: list[list[int]], steps: int) -> float:
    """Tokens a second of the whole call: its prefill is 32 tokens a prompt."""
    config = GenerationConfig(max_new_tokens=steps, do_sample=False, eos_token_id=-1, pad_token_id=0)
    started = time.perf_counter()
    outputs = peer.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return tokens / (time.perf_counter() - started)


@torch.inference_mode()
def forward_seconds(peer: LlamaForCausalLM, prompt: list[int]) -> float:
    started = time.perf_counter()
    peer(torch.tensor([prompt]), logits_to_keep=1)
    return time.perf_counter() - started


def read_bytes_per_s(size: int = 2**28) -> float:
    """A read-only stream over memory that no cache holds."""
    data = torch.ones(size // 4)
    data.sum()
    return median(size / timed(data.sum) for _ in range(3))


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def scheduler_us(model: LoadedModel, config: EngineConfig, running: int, steps: int = 200) -> float:
    """CPU time a step spends outside the model, the event loop's and the streams' share included."""

    class Instant:
        def execute(self, plan: StepPlan) -> list[int | None]:
            return [None if row.draw is None else 1 for row in plan.rows]

    engine = Engine(model, config)
    engine._runner = Instant()  # the model is what this figure leaves out
    prompts = [[i % VOCAB + 1] * 4 for i in range(running)]
    started = time.process_time()
    asyncio.run(drive(engine, model, prompts, steps))
    return (time.process_time() - started) / steps * 1e6


TARGETS = {
    "decode_over_transformers": "at least 2",
    "decode_over_transformers_min": "at least 1.0",
    "decode_over_limit": "aim at 0.6",
    "prefill_over_transformers": "at least 0.95",
    "scheduler_us": "at most 300",
}


def show(figures: dict[str, float], dtype: str) -> None:
    table = Table(title=f"engine: 100M Llama, {dtype}, medians", title_justify="left")
    for name, justify in (("figure", "left"), ("value", "right"), ("target", "left")):
        table.add_column(name, justify=justify)
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}" if value < 10 else f"{value:.1f}", TARGETS.get(name, ""))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
