"""One engine with its transfer over a store in memory, and the reference it is held to."""

import asyncio
from contextlib import asynccontextmanager

import torch
from memory_store import MemoryStore

from kvferry.common.config import EngineConfig
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.engine.engine import Engine
from kvferry.engine.transfer import Transfer
from kvferry.prefill.service import Fill

PATIENCE_S = 60
BLOCK = 16


class Node:
    """An engine, its transfer and a store. `plans` are the steps that ran; `fail_on` makes a step raise."""

    def __init__(self, model, store, **config):
        self.engine = Engine(model, EngineConfig(model="tiny", **{"num_blocks": 64, **config}))
        self.store = store
        self.transfer = Transfer(self.engine.pool, self.engine.memory, store, single_flight_wait_s=PATIENCE_S)
        self.plans = []
        self.fail_on = lambda plan: False
        self._execute = self.engine._runner.execute
        self.engine._runner.execute = self._record
        self.engine.on_change(self.engine.scheduler.check_integrity)
        self.scope = CacheScope(TenantKeys.of(b"k" * 32), model.fingerprint, model.layout)

    def _record(self, plan):
        self.plans.append(plan)
        if self.fail_on(plan):
            raise RuntimeError("planted")
        return self._execute(plan)

    def computed(self, seq) -> list[int]:
        """The positions that steps computed for a sequence, in order."""
        rows = [(plan, plan.seq_ids.index(seq.id)) for plan in self.plans if seq.id in plan.seq_ids]
        spans = [(int(plan.positions[row]), int(plan.lengths[row])) for plan, row in rows]
        return [position for start, length in spans for position in range(start, start + length)]

    def sequence(self, prompt, count=12, *, limit=None, **params):
        params = SamplingParams(**{"max_tokens": count, "min_tokens": count, "temperature": 0.0, **params})
        return self.engine.new_sequence(
            "request", self.scope, prompt, len(prompt), params, params.max_tokens if limit is None else limit
        )

    async def pull(self, seq) -> None:
        await self.transfer.pull(seq, len(seq.names))

    async def tokens(self, seq, restore=None) -> list[int]:
        (tokens,) = (await self.choices(seq, restore)).values()
        return tokens

    async def choices(self, seq, restore=None) -> dict[int, list[int]]:
        """The tokens of each choice."""
        tokens = {draw.params.choice: [] for draw in seq.draws}

        def take(event):
            if event.token is not None:
                tokens[event.seq.params.choice].append(event.token)

        await self.engine.generate(seq, restore or self.pull, take)
        return tokens

    async def ask(self, prompt, count=12, **params) -> list[int]:
        return await self.tokens(self.sequence(prompt, count, **params))

    async def fill(self, prompt, **params) -> "tuple[Fill, object]":
        """Run a prefill's fill to its end; it and its last report. Close it."""
        fill = Fill(self, self.sequence(prompt, limit=1, **params))
        computing = asyncio.create_task(fill.run())
        return fill, [report async for report in fill.reports(computing)][-1]

    async def publish(self, prompt) -> None:
        fill, _ = await self.fill(prompt)
        fill.close()
        await asyncio.gather(*self.transfer._releases)

    def forget(self) -> None:
        """Make the page pool forget every name, so that only the store can help."""
        self.engine.pool.release(self.engine.pool.allocate(self.engine.pool.num_free))

    def check_nothing_held(self) -> None:
        assert self.engine.idle
        assert self.engine.pool.num_free == self.engine.pool.num_blocks
        self.engine.scheduler.check_integrity()
        self.store.check_nothing_held()


@asynccontextmanager
async def running(model, store=None, **config):
    """A node whose loop runs. On the way out: the loop did not fail, and nothing is held."""
    node = Node(model, store or MemoryStore(), **config)
    loop = asyncio.create_task(node.engine.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield node
            await asyncio.gather(*node.transfer._releases)
            node.check_nothing_held()
    finally:
        node.engine.stop()
        await loop


async def until(condition) -> None:
    """Let the others go on until it holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - conditions span objects that have no event
            await asyncio.sleep(0)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def greedy(reference, prompt, count, **options) -> list[int]:
    """What transformers generates. The mask is of ones, because a prompt may hold the pad token."""
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


def assert_greedy(reference, prompt, tokens, count=12) -> None:
    """Equal to the reference, or different where its two best logits are within 1e-3 of their deviation."""
    expected = greedy(reference, prompt, count, min_new_tokens=count)
    assert len(tokens) == len(expected)
    first = next((i for i, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1]), None)
    if first is not None:
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + expected[:first]])).logits[0, -1]
        best = logits.topk(2).values
        gap = ((best[0] - best[1]) / logits.std()).item()
        assert gap < 1e-3, f"token {first} of {tokens} is not {expected[first]}, whose gap is {gap}"
