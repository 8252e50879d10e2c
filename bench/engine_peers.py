"""Transformers, and a stream that only reads, in processes of their own: what bench/engine.py compares to."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaForCausalLM, LogitsProcessor


class Peers:
    """Transformers in processes of their own: `generate`, `generate_batch`, and a stream that only reads."""

    def __init__(self, folder: Path, dtype: str, threads: int):
        spawn = multiprocessing.get_context("spawn")
        self._of = {
            work: ProcessPoolExecutor(1, spawn, become_peer, (str(folder), dtype, threads))
            for work in (generate_step_seconds, forward_seconds, generate_batch_tokens_per_s, read_bytes_per_s)
        }
        self._of[forward_seconds] = self._of[generate_step_seconds]

    def ask(self, work: Callable[..., float], *args: object) -> float:
        return self._of[work].submit(work, *args).result()

    def close(self) -> None:
        for process in self._of.values():
            process.shutdown()


def become_peer(folder: str, dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    peer.append(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval())


peer: list[LlamaForCausalLM] = []  # of a peer's process


class Moments(LogitsProcessor):
    """Notes when each step of `generate` has its logits."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at.append(time.perf_counter())
        return scores


@torch.inference_mode()
def generate_step_seconds(prompts: list[list[int]], steps: int) -> float:
    model, moments, tokens = peer[0], Moments(), torch.tensor(prompts)
    config, there = model.config, DynamicCache(config=model.config)
    for layer in range(config.num_hidden_layers):
        shape = (len(prompts), config.num_key_value_heads, tokens.shape[1] - 1, config.head_dim)
        there.update(*(torch.randn(shape, dtype=model.dtype) for _ in range(2)), layer)
    model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=steps + 1, do_sample=False, pad_token_id=0,
        logits_processor=[moments], past_key_values=there,
    )  # fmt: skip
    assert len(moments.at) == steps + 1
    return median(late - early for early, late in pairwise(moments.at))


def generate_batch_tokens_per_s(prompts: list[list[int]], steps: int) -> float:
    """Tokens a second between a short and a longer call: neither its start nor its prefill counts. The first call pays
    for more than its start, and is left out."""

    def seconds(new_tokens: int) -> float:
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        return timed(lambda: peer[0].generate_batch(inputs=prompts, generation_config=config, progress_bar=False))

    seconds(steps)
    return len(prompts) * 2 * steps / (seconds(3 * steps) - seconds(steps))


@torch.inference_mode()
def forward_seconds(prompt: list[int]) -> float:
    started = time.perf_counter()
    peer[0](torch.tensor([prompt]), logits_to_keep=1)
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
