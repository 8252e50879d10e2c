"""Log probabilities, of what is generated and of the prompt, are the reference's; the prompt's are computed anew even
where its KV is known."""

import asyncio

import pytest
import torch
from engine_harness import prompt_of, running

COUNT = 8


def reference_logprobs(model, tokens):
    """float32 `[len(tokens) - 1, vocab]`: entry i is about token i + 1."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)


def check(told, token, expected, top):
    assert told.logprob == pytest.approx(expected[token].item(), abs=2e-3)
    assert told.rank == int((expected > expected[token]).sum())
    best = expected.topk(top)
    assert [token for token, _ in told.top] == best.indices.tolist()
    assert [value for _, value in told.top] == pytest.approx(best.values.tolist(), abs=2e-3)


async def told_by(node, seq):
    """Tokens, what is told of them, and what is told of the prompt."""
    tokens, told, prompt_told = [], [], []

    def take(event):
        prompt_told.extend(event.prompt_logprobs)
        if event.token is not None:
            tokens.append(event.token)
            told.append(event.logprobs)

    await node.engine.generate(seq, node.pull, take)
    return tokens, told, prompt_told


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_of_what_is_generated(models, references, temperature):
    prompt = prompt_of(30)

    async def main():
        async with running(models["llama"], max_num_batched_tokens=24) as node:
            seq = node.sequence(prompt, COUNT, logprobs=4, temperature=temperature, seed=3)
            beside = asyncio.create_task(node.ask(prompt_of(40), COUNT))
            answer = await told_by(node, seq)
            await beside
            return answer

    tokens, told, prompt_told = asyncio.run(main())
    assert prompt_told == []
    expected = reference_logprobs(references["llama"], prompt + tokens)[len(prompt) - 1 :]
    for token, one, row in zip(tokens, told, expected, strict=True):
        check(one, token, row, 4)


def test_of_nothing_that_was_not_asked_for(models):
    async def main():
        async with running(models["llama"]) as node:
            _, told, prompt_told = await told_by(node, node.sequence(prompt_of(30), COUNT))
            assert told == [None] * COUNT
            assert prompt_told == []
            _, told, _ = await told_by(node, node.sequence(prompt_of(30), COUNT, logprobs=0))
            assert [one.top for one in told] == [()] * COUNT

    asyncio.run(main())


@pytest.mark.parametrize("length", [1, 2, 16, 33, 70])
def test_of_the_prompt(models, references, length):
    """In chunks, beside others, and although its KV is in the page pool and in the store."""
    prompt = prompt_of(length)

    async def main():
        async with running(models["llama"], max_num_batched_tokens=24) as node:
            await node.publish(prompt)
            await node.ask(prompt, COUNT)
            seq = node.sequence(prompt, COUNT, prompt_logprobs=2)
            beside = asyncio.create_task(node.ask(prompt_of(40), COUNT))
            answer = await told_by(node, seq)
            await beside
            assert node.computed(seq)[:length] == list(range(length))
            return answer

    _, _, told = asyncio.run(main())
    expected = reference_logprobs(references["llama"], prompt)
    for token, one, row in zip(prompt[1:], told, expected, strict=True):
        check(one, token, row, 2)


def test_of_a_prompt_that_is_pushed_out(models, references):
    """It is computed again, and told of once."""
    prompts = [prompt_of(60, seed) for seed in range(3)]

    async def main():
        async with running(models["llama"], num_blocks=9, max_num_batched_tokens=16) as node:
            seqs = [node.sequence(prompt, 60, prompt_logprobs=1) for prompt in prompts]
            answers = await asyncio.gather(*[told_by(node, seq) for seq in seqs])
            assert node.engine.scheduler.num_preemptions > 0
            return answers

    for prompt, (_, _, told) in zip(prompts, asyncio.run(main()), strict=True):
        for token, one, row in zip(prompt[1:], told, reference_logprobs(references["llama"], prompt), strict=True):
            check(one, token, row, 1)
