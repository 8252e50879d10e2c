"""Several answers to one prompt: each is what a request of its own would get, and they share what they can."""

import asyncio

import pytest
from engine_harness import BLOCK, prompt_of, running, until

from kvferry.common.errors import InvalidRequest
from kvferry.common.proto import worker_pb2 as pb
from kvferry.decode.service import Continuation
from kvferry.engine.sequence import Status

DRAWN = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
LENGTHS = (1, 15, 16, 17, 45, 64)


async def one_by_one(node, prompt, n, count, **params):
    return {choice: await node.ask(prompt, count, choice=choice, **params) for choice in range(n)}


@pytest.mark.parametrize("length", LENGTHS)
def test_four_choices_are_four_requests(models, length):
    """With the seed and the choices that it uses."""
    prompt = prompt_of(length)

    async def main():
        async with running(models["llama"], max_num_batched_tokens=32) as node:
            together = await node.choices(node.sequence(prompt, 20, n=4, **DRAWN))
            node.forget()
            alone = await one_by_one(node, prompt, 4, 20, **DRAWN)
            assert together == alone
            assert len({tuple(tokens) for tokens in together.values()}) == 4, "they should differ"

    asyncio.run(main())


@pytest.mark.parametrize("num_blocks", [9, *(pytest.param(blocks, marks=pytest.mark.long) for blocks in (12, 20))])
def test_in_a_pool_too_small_for_all(models, num_blocks):
    """Branches are pushed out, come back, and go on where they were."""
    prompts = [prompt_of(37, seed) for seed in range(3)]

    async def main():
        async with running(models["qwen2"], num_blocks=num_blocks, max_num_batched_tokens=40) as node:
            groups = [node.sequence(prompt, 60, n=3, **DRAWN) for prompt in prompts]
            together = await asyncio.gather(*[node.choices(group) for group in groups])
            assert node.engine.scheduler.num_preemptions > 0
            for prompt, tokens in zip(prompts, together, strict=True):
                assert tokens == await one_by_one(node, prompt, 3, 60, **DRAWN)

    asyncio.run(main())


def test_branches_share_every_full_block(models):
    """Eight branches of a prompt of 6.5 blocks stand in 6 shared ones; only the partial one is copied, seven times."""
    prompt, n = prompt_of(6 * BLOCK + BLOCK // 2), 8

    async def main():
        async with running(models["llama"], num_blocks=40) as node:
            group = asyncio.create_task(node.choices(node.sequence(prompt, 4, n=n, **DRAWN)))
            await until(lambda: len(node.engine.scheduler.of(Status.RUNNING)) == n)
            branches = node.engine.scheduler.of(Status.RUNNING)
            assert len({tuple(seq.block_table[:6]) for seq in branches}) == 1
            assert all(node.engine.pool.holders(block) == n for block in branches[0].block_table[:6])
            await group
            copies = [pair for plan in node.plans for pair in plan.copies.tolist()]
            assert len(copies) == n - 1
            assert len({source for source, _ in copies}) == 1
            node.plans.clear()
            await node.choices(node.sequence(prompt[: 6 * BLOCK], 4, n=n, **DRAWN))
            assert not any(len(plan.copies) for plan in node.plans), "nothing partial was shared: nothing is copied"

    asyncio.run(main())


def test_branches_end_each_by_itself(models):
    ends = tuple(range(0, 300, 3))
    prompt = prompt_of(20)
    params = {"min_tokens": 1, "ignore_eos": True, "stop_token_ids": ends, **DRAWN}

    async def main():
        async with running(models["llama"]) as node:
            together = await node.choices(node.sequence(prompt, 30, n=6, **params))
            assert together == await one_by_one(node, prompt, 6, 30, **params)
            assert len({len(tokens) for tokens in together.values()}) > 1, "all ended at once: nothing was tested"

    asyncio.run(main())


@pytest.mark.parametrize("length", [16, 21, 40])
def test_filled_by_another_node(models, length):
    """A fill gives the first token of each choice; the continue goes on from those, and draws none of them again."""
    prompt = prompt_of(length)

    async def main():
        async with running(models["llama"]) as node:
            alone = await one_by_one(node, prompt, 3, 10, **DRAWN)
            fill, report = await node.fill(prompt, n=3, **DRAWN)
            first = [token.token_id for token in report.first_tokens]
            assert first == [tokens[0] for tokens in alone.values()]
            node.forget()
            seq = node.sequence(prompt, 10, n=3, **DRAWN)
            report.first_tokens[1].finish_reason = "stop"  # as if it had been the last one
            progress = pb.FillProgress(
                committed_blocks=report.committed_blocks, first_tokens=report.first_tokens, done=True
            )
            told = await continued(node, seq, pb.ContinueCommand(progress=progress))
            assert told == {0: alone[0][1:], 2: alone[2][1:]}
            fill.close()

    asyncio.run(main())


@pytest.mark.parametrize("length", [30, 31, 32])
def test_a_branch_publishes_every_block_of_its_own(models, length):
    """Also the one that its first token, which a fill has chosen, makes full: a chat's next turn begins with it."""
    prompt = prompt_of(length)

    async def main():
        async with running(models["llama"]) as node:
            fill, report = await node.fill(prompt, n=2, **DRAWN)
            progress = pb.FillProgress(
                committed_blocks=report.committed_blocks, first_tokens=report.first_tokens, done=True
            )
            told = await continued(node, node.sequence(prompt, 40, n=2, **DRAWN), pb.ContinueCommand(progress=progress))
            for choice, first in enumerate(report.first_tokens):
                tokens = [*prompt, first.token_id, *told[choice]]
                names = node.scope.chain(tokens[:-1])  # of the last one there is no KV
                assert [name in node.store.blocks for name in names] == [True] * len(names)
            fill.close()

    asyncio.run(main())


async def continued(node, seq, *given: pb.ContinueCommand) -> dict[int, list[int]]:
    """What a decode node sends for a sequence, by choice, given these commands."""

    async def commands():
        for command in given:
            yield command

    told: dict[int, list[int]] = {}
    last: list[str] = []

    def tell(event: pb.ContinueEvent) -> None:
        last[:] = [event.WhichOneof("event")]
        if event.HasField("tokens"):
            told.setdefault(event.tokens.choice, []).extend(event.tokens.token_ids)

    await Continuation(node, seq, True, tell).run(commands())
    assert last == ["finished"]
    return told


def test_an_abort_ends_all_branches(models):
    async def main():
        async with running(models["llama"]) as node:
            group = asyncio.create_task(node.choices(node.sequence(prompt_of(20), 900, n=4, **DRAWN)))
            await until(lambda: len(node.engine.scheduler.of(Status.RUNNING)) == 4)
            group.cancel()
            await asyncio.gather(group, return_exceptions=True)
            assert group.cancelled()
            await until(lambda: node.engine.idle)  # the step that was in flight

    asyncio.run(main())


def test_a_choice_that_is_not_wanted_any_more(models):
    """It stops at once, whatever it is doing; the others are what they are alone; the last one ends the request."""
    prompt = prompt_of(37)

    async def main():
        async with running(models["llama"]) as node:
            alone = await one_by_one(node, prompt, 3, 200, **DRAWN)
            node.forget()
            seq = node.sequence(prompt, 200, n=3, **DRAWN)
            group = asyncio.create_task(node.choices(seq))
            await until(lambda: len(node.engine.scheduler.of(Status.RUNNING)) == 3)
            held = node.engine.pool.num_free
            node.engine.end_choice(seq, 1)
            node.engine.end_choice(seq, 1)
            await until(lambda: len(node.engine.scheduler.of(Status.RUNNING)) == 2)
            assert node.engine.pool.num_free > held
            node.engine.end_choice(seq, 0)
            node.engine.end_choice(seq, 2)
            together = await group
            for choice in range(3):
                assert together[choice] == alone[choice][: len(together[choice])]
                assert len(together[choice]) < 200
            node.engine.end_choice(seq, 2)
            await until(lambda: node.engine.idle)

    asyncio.run(main())


@pytest.mark.parametrize("wanted", [(0, 2), (1,), (2,)])
def test_ended_by_its_first_token(models, wanted):
    """The router has seen all that it wants of some choices before this node has begun with them."""
    prompt = prompt_of(21)

    async def main():
        async with running(models["llama"]) as node:
            alone = await one_by_one(node, prompt, 3, 10, **DRAWN)
            fill, report = await node.fill(prompt, n=3, **DRAWN)
            node.forget()
            seq = node.sequence(prompt, 10, n=3, **DRAWN)
            ends = [pb.ContinueCommand(end_choice=pb.EndChoice(choice=choice)) for choice in {0, 1, 2} - set(wanted)]
            progress = pb.FillProgress(
                committed_blocks=report.committed_blocks, first_tokens=report.first_tokens, done=True
            )
            told = await continued(node, seq, *ends, pb.ContinueCommand(progress=progress))
            assert told == {choice: alone[choice][1:] for choice in wanted}
            fill.close()

    asyncio.run(main())


def test_more_choices_than_places_are_refused(models):
    async def main():
        async with running(models["llama"], max_num_seqs=4) as node:
            with pytest.raises(InvalidRequest, match="n is 5; this node runs 1 to 4 at once"):
                await node.choices(node.sequence(prompt_of(20), 8, n=5))

    asyncio.run(main())
