"""The engine: the answers are the reference's, whatever happens to the pool or to the neighbours, and afterwards
nothing is held."""

import asyncio

import pytest
from checkpoints import ARCHITECTURES
from engine_harness import Node, assert_greedy, greedy, prompt_of, running, until
from memory_store import MemoryStore

from kvferry.common.errors import Internal, InvalidRequest, NotANumber, Overloaded, Unavailable
from kvferry.common.sampling import SamplingParams
from kvferry.engine.sequence import Status

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
            assert max(len(plan.seq_ids) for plan in node.plans) == len(prompts), "they never ran together"
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


# -- neighbours and ends -----------------------------------------------------------------------------------------


def test_an_abort_frees_everything_and_disturbs_nobody(models, references):
    prompts = [prompt_of(33, seed) for seed in range(3)]

    async def main():
        async with running(models["llama"], max_num_batched_tokens=40) as node:
            stayed = [asyncio.create_task(node.ask(prompt, 30)) for prompt in prompts[:2]]
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


def test_room_that_an_abort_makes_is_given_on_at_once(models, references):
    """Also when no step runs: the one that went was only being restored."""
    prompt = prompt_of(33)

    async def main():
        async with running(models["llama"], max_num_seqs=1) as node:
            begun = asyncio.Event()

            async def forever(seq):
                begun.set()
                await asyncio.Event().wait()

            first = asyncio.create_task(node.tokens(node.sequence(prompt), forever))
            await begun.wait()
            second = asyncio.create_task(node.ask(prompt))
            await until(lambda: node.engine.scheduler.of(Status.WAITING))
            first.cancel()
            return await second

    assert_greedy(references["llama"], prompt, asyncio.run(main()))


def test_a_failed_step_fails_its_streams_only(models, references, caplog):
    prompts = [prompt_of(20, seed) for seed in range(3)]

    async def main():
        async with running(models["llama"]) as node:
            pulled = asyncio.Event()

            async def late(seq):
                await pulled.wait()

            node.fail_on = lambda plan: len(plan.seq_ids) == 2 and len(node.plans) > 4
            doomed = [asyncio.create_task(node.ask(prompt, 50)) for prompt in prompts[:2]]
            spared = asyncio.create_task(node.tokens(node.sequence(prompts[2]), late))
            outcomes = await asyncio.gather(*doomed, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [Internal, Internal]
            assert node.engine.scheduler.of(Status.RESTORING), "the third was not there when it happened"
            pulled.set()
            return await spared

    assert_greedy(references["llama"], prompts[2], asyncio.run(main()))
    assert "planted" in caplog.text


def test_a_row_of_nan_is_nobody_elses(models, references):
    """Only the request that the model cannot compute is told so, and that it is no use to try again."""
    prompts = [prompt_of(20, seed) for seed in range(4)]

    async def main():
        async with running(models["llama"]) as node:
            logits, poisoned = node.engine._runner.logits, node.sequence(prompts[3], 50)

            def spoilt(plan):
                found = logits(plan)
                if poisoned.id in plan.seq_ids and len(plan.seq_ids) == 4:
                    found[plan.draw_rows.tolist().index(plan.seq_ids.index(poisoned.id)), 7] = float("nan")
                return found

            node.engine._runner.logits = spoilt
            asked = [node.ask(prompt, 30) for prompt in prompts[:3]]
            *answers, failure = await asyncio.gather(*asked, node.tokens(poisoned), return_exceptions=True)
            assert type(failure) is NotANumber
            return answers

    for prompt, tokens in zip(prompts, asyncio.run(main()), strict=False):
        assert_greedy(references["llama"], prompt, tokens, 30)


def test_a_chunk_of_nan_is_not_kept_for_others(models, references):
    """A prompt's first chunk is broken: its request fails, and whoever sends the same computes it anew."""
    prompt = prompt_of(100, 5)

    async def main():
        async with running(models["llama"], max_num_batched_tokens=32) as node:
            logits = node.engine._runner.logits

            def spoilt(plan):
                assert len(plan.draws) == 0
                return logits(plan) * float("nan")

            node.engine._runner.logits = spoilt
            with pytest.raises(NotANumber):
                await node.ask(prompt, 5)
            node.engine._runner.logits = logits
            seq = node.sequence(prompt, 5)
            tokens = await node.tokens(seq)
            assert seq.num_reused == 0
            return tokens

    assert_greedy(references["llama"], prompt, asyncio.run(main()), 5)


def test_a_longer_line_of_another_tenant_makes_way(models):
    """The one that came last in it is told to come again; nobody whose answer has begun is."""

    async def main():
        async with running(models["llama"], max_num_seqs=1, max_waiting=3) as node:
            line = [asyncio.create_task(node.ask(prompt_of(20, seed))) for seed in range(4)]
            await until(lambda: node.engine.scheduler._tenants.num_waiting == 3)
            newcomer = node.sequence(prompt_of(20, 9))
            newcomer.tenant = "another"
            answered = await node.tokens(newcomer)
            assert len(answered) == 12
            outcomes = await asyncio.gather(*line, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [list, list, list, Overloaded]

    asyncio.run(main())


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
        ([1], {"stop_token_ids": (300,)}, "stop_token_ids is outside the model's vocabulary"),
        ([1], {"logit_bias": ((300, 1.0),)}, "logit_bias is outside"),
        ([1], {"logit_bias": ((3, float("nan")),)}, "logit_bias is nan"),
        ([1], {"bad_words": ((1, 300),)}, "bad_words is outside"),
        ([1], {"bad_words": ((),)}, "a bad word must have a token"),
        ([1], {"temperature": float("inf")}, "temperature is inf"),
        ([1], {"temperature": -1.0}, "temperature is -1"),
        ([1], {"top_p": 1.5}, "top_p is 1.5"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ([1], {"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ([1], {"logprobs": 301}, "logprobs asks for more"),
        ([1], {"n": 0}, "n is 0; this node runs 1 to 64"),
    ],
)
def test_what_can_never_be_is_refused(models, prompt, params, sentence):
    node = Node(models["llama"], MemoryStore())
    with pytest.raises(InvalidRequest, match=sentence):
        node.sequence(prompt, **params)
    node.engine.stop()


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e308, float("nan"), float("inf")])
def test_a_weight_that_weighs_nothing_is_refused(models, weight):
    node = Node(models["llama"], MemoryStore())
    with pytest.raises(InvalidRequest, match="weight"):
        node.engine.new_sequence("r", node.scope, [1], 1, SamplingParams(), 1, weight=weight)
    node.engine.stop()
