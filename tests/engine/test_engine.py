"""The engine with its transfer over a store in memory: the answers are the reference's, whatever happens to the cache,
to the pool or to the neighbours, and afterwards nothing is held."""

import asyncio
from contextlib import aclosing, asynccontextmanager

import pytest
import torch
from checkpoints import ARCHITECTURES
from memory_store import MemoryStore

from kvferry.common.config import EngineConfig
from kvferry.common.errors import Internal, InvalidRequest, Unavailable
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.engine.engine import Engine
from kvferry.engine.sequence import Status
from kvferry.engine.transfer import FillHolding, Transfer
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
        self.scope = CacheScope(TenantKeys.from_chain_key(b"k" * 32), model.fingerprint, model.layout)

    def _record(self, plan):
        self.plans.append(plan)
        if self.fail_on(plan):
            raise RuntimeError("planted")
        return self._execute(plan)

    def computed(self, seq) -> list[int]:
        """The positions that steps computed for a sequence, in order."""
        rows = [row for plan in self.plans for row in plan.rows if row.seq_id == seq.id]
        return [row.start + i for row in rows for i in range(len(row.token_ids))]

    def sequence(self, prompt, count=12, *, limit=None, **params):
        params = SamplingParams(**{"max_tokens": count, "min_tokens": count, "temperature": 0.0, **params})
        return self.engine.new_sequence(
            "request", self.scope, prompt, len(prompt), params, params.max_tokens if limit is None else limit
        )

    async def pull(self, seq) -> None:
        await self.transfer.pull(seq, len(seq.names))

    async def tokens(self, seq, restore=None) -> list[int]:
        async with aclosing(self.engine.generate(seq, restore or self.pull)) as steps:
            return [step.token async for step in steps if step.token is not None]

    async def ask(self, prompt, count=12, **params) -> list[int]:
        return await self.tokens(self.sequence(prompt, count, **params))

    async def fill(self, prompt) -> "tuple[Fill, object]":
        """Run a prefill's fill to its end; it and its last report. Close it."""
        fill = Fill(self, self.sequence(prompt, limit=1))
        computing = asyncio.create_task(fill.run())
        return fill, [report async for report in fill.reports(computing)][-1]

    async def publish(self, prompt) -> None:
        fill, _ = await self.fill(prompt)
        await fill.close()

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


# -- right answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_alone(models, references, arch):
    async def main():
        async with running(models[arch], max_num_batched_tokens=24) as node:
            for length in (1, 15, 16, 17, 70):
                assert_greedy(references[arch], prompt_of(length), await node.ask(prompt_of(length)))

    asyncio.run(main())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_eight_at_once(models, references, arch):
    prompts = [prompt_of(length) for length in (3, 16, 31, 32, 33, 50, 64, 90)]

    async def main():
        async with running(models[arch], max_num_batched_tokens=40) as node:
            answers = await asyncio.gather(*[node.ask(prompt) for prompt in prompts])
            assert max(len(plan.rows) for plan in node.plans) == len(prompts), "they never ran together"
            return answers

    for prompt, tokens in zip(prompts, asyncio.run(main()), strict=True):
        assert_greedy(references[arch], prompt, tokens)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_pool_too_small_for_all(models, references, arch):
    prompts = [prompt_of(30, seed) for seed in range(4)]

    async def main():
        async with running(models[arch], num_blocks=9, max_num_batched_tokens=40) as node:
            answers = await asyncio.gather(*[node.ask(prompt, 40) for prompt in prompts])
            assert node.engine.scheduler.num_preemptions > 0
            return answers

    for prompt, tokens in zip(prompts, asyncio.run(main()), strict=True):
        assert_greedy(references[arch], prompt, tokens, 40)


def test_it_ends_where_the_reference_ends(models, references):
    """Every fourth token id ends the sequence, so that ends come early and at different places."""
    ends = list(range(0, 300, 4))
    prompts = [prompt_of(20, seed) for seed in range(6)]

    async def main():
        async with running(models["llama"]) as node:
            return await asyncio.gather(
                *[node.ask(p, min_tokens=3, ignore_eos=True, stop_token_ids=tuple(ends)) for p in prompts]
            )

    answers = asyncio.run(main())
    for prompt, tokens in zip(prompts, answers, strict=True):
        expected = greedy(references["llama"], prompt, 12, eos_token_id=ends, min_new_tokens=3)
        assert tokens == expected
    assert len({len(tokens) for tokens in answers}) > 1, "all ended at once: nothing was tested"


def test_drawn_tokens_do_not_depend_on_batch_or_reuse(models):
    prompt = prompt_of(70)
    drawn = {"temperature": 1.0, "top_p": 0.95, "seed": 7}

    async def main():
        async with running(models["llama"], max_num_batched_tokens=32) as node:
            alone = await node.ask(prompt, 20, **drawn)
            from_pool = node.sequence(prompt, 20, **drawn)
            assert await node.tokens(from_pool) == alone
            assert from_pool.num_reused == 64
            node.forget()
            await node.publish(prompt)
            node.forget()
            pulled = node.sequence(prompt, 20, **drawn)
            assert await node.tokens(pulled) == alone
            assert node.computed(pulled)[0] == 64
            node.forget()
            others = [node.ask(prompt_of(40, seed), 20, temperature=1.0, seed=seed) for seed in range(5)]
            assert (await asyncio.gather(*others, node.ask(prompt, 20, **drawn)))[-1] == alone
            assert await node.ask(prompt, 20, **{**drawn, "seed": 8}) != alone

    asyncio.run(main())


# -- what the cache does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 47, 80])
def test_a_fill_publishes_every_full_block(models, length):
    async def main():
        async with running(models["llama"], max_num_batched_tokens=32) as node:
            fill, report = await node.fill(prompt_of(length))
            assert report.committed_blocks == length // BLOCK == len(node.store.blocks)
            assert report.first_token == (await node.ask(prompt_of(length), 1))[0]
            names = node.scope.chain(prompt_of(length))
            parents = [node.scope.root(), *names][: len(names)]
            assert [node.store.parents[name] for name in names] == parents
            await fill.close()

    asyncio.run(main())


def test_what_is_published_is_pulled_and_not_computed(models, references):
    prompt = prompt_of(80)

    async def main():
        store = MemoryStore()
        async with running(models["llama"], store) as node:
            await node.publish(prompt)
        async with running(models["llama"], store) as node:
            seq = node.sequence(prompt)
            assert_greedy(references["llama"], prompt, await node.tokens(seq))
            assert node.computed(seq) == list(range(64, 91)), "the last block is not reused: a token must be left"

    asyncio.run(main())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("how", ["bad", "evicted"])
def test_a_hole_is_all_that_is_computed(models, references, arch, how):
    prompt = prompt_of(101)

    async def main():
        async with running(models[arch]) as node:
            await node.publish(prompt)
            node.forget()
            hole = node.scope.chain(prompt)[2]
            node.store.bad.add(hole) if how == "bad" else node.store.evict(hole)
            seq = node.sequence(prompt, 4)
            assert_greedy(references[arch], prompt, await node.tokens(seq), 4)
            assert node.computed(seq) == [*range(32, 48), *range(96, 104)]

    asyncio.run(main())


def test_a_lapsed_lease_drops_all_that_was_pulled(models, references):
    prompt = prompt_of(60)

    async def main():
        async with running(models["llama"]) as node:
            await node.publish(prompt)
            node.forget()
            node.store.torn = True
            seq = node.sequence(prompt)
            assert_greedy(references["llama"], prompt, await node.tokens(seq))
            assert node.store.calls["pull"] > 0
            assert node.computed(seq)[0] == 0
            node.store.torn = False

    asyncio.run(main())


def test_the_second_of_two_fills_waits_for_the_first(models):
    prompt = prompt_of(65)

    async def main():
        async with running(models["llama"], max_num_batched_tokens=16) as node:
            node.store.publishing.clear()
            first = asyncio.create_task(node.fill(prompt))
            await until(lambda: node.store.calls["publish"] > 0)
            second = asyncio.create_task(node.fill(prompt))
            await until(lambda: node.store.waiters > 0)
            before = len(node.store.leases)
            node.store.publishing.set()
            filled, report = await first
            assert before == 1, "who waits holds nothing"
            again, reused = await second
            assert (report.reuse.computed_tokens, reused.reuse.computed_tokens) == (65, 1)
            assert report.first_token == reused.first_token
            assert reused.committed_blocks == 4
            await filled.close()
            await again.close()

    asyncio.run(main())


def test_a_fill_whose_first_is_gone_computes(models):
    """The one that reserved goes away without publishing: who waited takes over."""
    prompt = prompt_of(40)

    async def main():
        async with running(models["llama"]) as node:
            gone = FillHolding(node.transfer, node.sequence(prompt))
            await gone.open()
            waiting = asyncio.create_task(node.fill(prompt))
            await until(lambda: node.store.waiters > 0)
            assert not node.plans
            await gone.close()
            fill, report = await waiting
            assert (report.committed_blocks, report.reuse.computed_tokens) == (2, 40)
            await fill.close()

    asyncio.run(main())


def test_a_publisher_that_is_cancelled_lets_go(models):
    async def main():
        async with running(models["llama"], max_num_batched_tokens=16) as node:
            node.store.publishing.clear()
            seq = node.sequence(prompt_of(65), limit=1)
            fill = Fill(node, seq)
            computing = asyncio.create_task(fill.run())
            await until(lambda: node.store.calls["publish"] > 0 and seq not in node.engine.scheduler)
            assert node.engine.pool.num_free == 60, "the blocks that wait for publishing are held"
            computing.cancel()
            await asyncio.gather(computing, return_exceptions=True)
            await fill.close()
            assert node.engine.pool.num_free == 64
            assert not node.store.blocks

    asyncio.run(main())


def test_blocks_are_free_while_a_store_is_slow_to_take_a_lease_back(models):
    """Whoever stops a pull gets the pool's blocks back at once, also when stopped twice."""
    prompt = prompt_of(60)

    async def main():
        async with running(models["llama"]) as node:
            await node.publish(prompt)
            node.forget()
            node.store.releasing.clear()
            asking = asyncio.create_task(node.ask(prompt))
            released = node.store.calls["release"]
            await until(lambda: node.store.calls["release"] > released)
            for _ in range(2):
                asking.cancel()
                await asyncio.sleep(0)
            await asyncio.gather(asking, return_exceptions=True)
            assert node.engine.pool.num_free == 64
            node.store.releasing.set()
            node.store.leases.clear()  # the release that was cut off; a real store's connection ends it

    asyncio.run(main())


# -- neighbours and ends -----------------------------------------------------------------------------------------


def test_an_abort_frees_everything_and_disturbs_nobody(models, references):
    prompts = [prompt_of(33, seed) for seed in range(3)]

    async def main():
        async with running(models["llama"], max_num_batched_tokens=40) as node:
            stayed = [asyncio.create_task(node.ask(prompt, 30)) for prompt in prompts[:2]]
            got = 0
            async with aclosing(node.engine.generate(node.sequence(prompts[2], 500), node.pull)) as steps:
                async for step in steps:
                    got += step.token is not None
                    if got == 3:
                        break
            cancelled = asyncio.create_task(node.ask(prompts[2], 500))
            seen = len(node.plans)
            await until(lambda: len(node.plans) >= seen + 3)
            cancelled.cancel()
            answers = await asyncio.gather(*stayed)
            await asyncio.gather(cancelled, return_exceptions=True)
            assert cancelled.cancelled()
            return answers

    for prompt, tokens in zip(prompts[:2], asyncio.run(main()), strict=True):
        assert_greedy(references["llama"], prompt, tokens, 30)


def test_a_failed_step_fails_its_streams_only(models, references, caplog):
    prompts = [prompt_of(20, seed) for seed in range(3)]

    async def main():
        async with running(models["llama"]) as node:
            pulled = asyncio.Event()

            async def late(seq):
                await pulled.wait()

            node.fail_on = lambda plan: len(plan.rows) == 2 and len(node.plans) > 4
            doomed = [asyncio.create_task(node.ask(prompt, 50)) for prompt in prompts[:2]]
            spared = asyncio.create_task(node.tokens(node.sequence(prompts[2]), late))
            outcomes = await asyncio.gather(*doomed, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [Internal, Internal]
            assert node.engine.scheduler.of(Status.RESTORING), "the third was not there when it happened"
            pulled.set()
            return await spared

    assert_greedy(references["llama"], prompts[2], asyncio.run(main()))
    assert "planted" in caplog.text


def test_stopping_ends_the_streams(models):
    async def main():
        node = Node(models["llama"], MemoryStore())
        loop = asyncio.create_task(node.engine.run())
        asking = asyncio.create_task(node.ask(prompt_of(20), 900))
        await until(lambda: len(node.plans) >= 3)
        node.engine.stop()
        with pytest.raises(Unavailable):
            await asking
        await loop
        with pytest.raises(Unavailable):
            await node.ask(prompt_of(20))
        node.check_nothing_held()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], {}, "empty"),
        ([300], {}, "vocabulary"),
        ([-1], {}, "vocabulary"),
        ([1] * 1024, {}, "1024 tokens"),
        ([1], {"stop_token_ids": (300,)}, "vocabulary"),
    ],
)
def test_what_can_never_be_is_refused(models, prompt, params, sentence):
    node = Node(models["llama"], MemoryStore())
    with pytest.raises(InvalidRequest, match=sentence):
        node.sequence(prompt, **params)
    node.engine.stop()
