"""Between page pool and store: what is there is pulled and not computed, what is not there or bad is computed, and the
answers are the reference's either way."""

import asyncio

import pytest
from checkpoints import ARCHITECTURES
from engine_harness import BLOCK, assert_greedy, prompt_of, running, until
from memory_store import MemoryStore
from spans import span

from kvferry.engine.sequence import Status
from kvferry.engine.transfer import FillHolding
from kvferry.prefill.service import Fill


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 47, 80])
def test_a_fill_publishes_every_full_block(models, length):
    async def main():
        async with running(models["llama"], max_num_batched_tokens=32) as node:
            fill, report = await node.fill(prompt_of(length))
            assert report.committed_blocks == length // BLOCK == len(node.store.blocks)
            assert [one.token_id for one in report.first_tokens] == await node.ask(prompt_of(length), 1)
            names = node.scope.chain(prompt_of(length))
            parents = [node.scope.root(), *names][: len(names)]
            assert [node.store.parents[name] for name in names] == parents
            fill.close()

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


def test_a_fill_publishes_a_bad_block_anew(models):
    """Only that block is computed, by the fill alone; decode finds all of them."""
    prompt = prompt_of(101)

    async def main():
        async with running(models["llama"]) as node:
            await node.publish(prompt)
            node.forget()
            node.store.bad.add(node.scope.chain(prompt)[2])
            fill, report = await node.fill(prompt)
            assert report.reuse.computed_tokens == 16 + 5
            assert report.committed_blocks == 6
            fill.close()
            assert all(name in node.store.blocks for name in node.scope.chain(prompt))

    asyncio.run(main())


def test_who_waits_for_room_gets_what_a_publisher_held(models):
    """A fill is over while its last blocks are still being published; the next one needs them, and nothing else will
    ever wake it."""

    async def main():
        async with running(models["llama"], num_blocks=5) as node:
            node.store.publishing.clear()
            first = asyncio.create_task(node.fill(prompt_of(65)))
            await until(lambda: node.store.calls["publish"] > 0 and node.engine.idle)
            second = asyncio.create_task(node.ask(prompt_of(70, seed=1), 1))
            await until(lambda: node.engine.scheduler.of(Status.WAITING))
            node.store.publishing.set()
            fill, _ = await first
            fill.close()
            await second

    asyncio.run(main())


def test_a_copy_under_way_never_lands_in_another_ones_blocks(models, references):
    """The sequence that it was for is pushed out meanwhile, and another one takes what is free."""
    pulled, other = prompt_of(70), prompt_of(70, seed=1)

    async def main():
        async with running(models["llama"], num_blocks=12, max_num_seqs=1) as node:
            await node.publish(pulled)
            node.forget()
            node.store.pulling.clear()
            slow, quick = node.sequence(pulled), node.sequence(other, 30)
            quick.priority = -1
            first = asyncio.create_task(node.tokens(slow))
            await until(lambda: node.store.calls["pull"] > 0)
            second = asyncio.create_task(node.tokens(quick))
            await until(lambda: quick in node.engine.scheduler)
            node.engine.scheduler.preempt(slow)
            await until(lambda: len(quick.token_ids) > 75)
            node.store.pulling.set()
            assert_greedy(references["llama"], other, await second, 30)
            assert_greedy(references["llama"], pulled, await first)

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
            assert report.first_tokens == reused.first_tokens
            assert reused.committed_blocks == 4
            filled.close()
            again.close()

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
            gone.close()
            fill, report = await waiting
            assert (report.committed_blocks, report.reuse.computed_tokens) == (2, 40)
            fill.close()

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
            fill.close()
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


def test_what_arrives_after_a_preemption_is_dropped(models, references):
    """The blocks it was meant for are somebody else's by then, and the sequence has others."""
    prompt = prompt_of(60)

    async def main():
        async with running(models["llama"]) as node:
            await node.publish(prompt)
            node.forget()
            node.store.releasing.clear()
            released = node.store.calls["release"]
            seq = node.sequence(prompt)
            asking = asyncio.create_task(node.tokens(seq))
            await until(lambda: node.store.calls["release"] > released)
            meant_for = seq.block_table
            node.engine.scheduler.preempt(seq)
            others = node.engine.pool.allocate(40)
            assert set(meant_for) <= set(others)
            node.engine._admit()
            assert seq.admissions == 2
            node.store.evict(seq.names[0])
            node.store.releasing.set()
            assert_greedy(references["llama"], prompt, await asking)
            assert node.computed(seq)[0] == 0, "it was taken for restored"
            node.engine.pool.release(others)

    asyncio.run(main())


def test_an_offer_publishes_what_nobody_has_or_makes(models):
    async def main():
        async with running(models["llama"]) as node:
            seq = node.sequence(prompt_of(70))
            root, names = node.scope.root(), seq.names
            await node.publish(seq.token_ids[:16])
            other = await node.store.reserve(span(names[1:2], names[0]), tenant="t")
            blocks = node.engine.pool.allocate(4)
            for index, block in enumerate(blocks):
                node.engine.memory.tensor[block] = float(index + 10)
            before = node.store.blocks[names[0]]
            await node.transfer.offer(seq, blocks, 0)
            node.engine.pool.release(blocks)
            assert set(node.store.blocks) == {names[0], names[2], names[3]}
            assert node.store.blocks[names[0]] == before, "what was published has changed"
            assert node.store.parents == {names[0]: root, names[2]: names[1], names[3]: names[2]}
            assert node.store.blocks[names[3]] == bytes(node.engine.memory.host_view(blocks[3]))
            await node.store.release(other.lease)

    asyncio.run(main())
