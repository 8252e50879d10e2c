"""A request's prompts made into jobs: tokenised, checked against the model that is up, and nothing left open."""

import secrets
from array import array

from kvferry.common.errors import InvalidRequest
from kvferry.common.hashing import TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.common.values import counted
from kvferry.router.flow import Job
from kvferry.router.limits import Limits
from kvferry.router.nodes import ServedModel
from kvferry.router.openai import GenerationRequest
from kvferry.router.text import Tokenizer, check_token_ids
from kvferry.router.values import check_prompt_tokens


async def jobs_of(
    asked: GenerationRequest,
    limits: Limits,
    keys: TenantKeys,
    request_id: str,
    tokenizer: Tokenizer,
    model: ServedModel,
    pool: int,
) -> list[Job]:
    """One job a prompt, each of all its choices. `pool`: how many tokens the largest page pool holds. Raises
    InvalidRequest."""
    bad_words = await tokenizer.bad_words(asked.bad_words, keys.pseudonym)
    prompts = await tokenizer.encode(asked.prompts, asked.special_tokens, limits, keys.pseudonym)
    seeds = _seeds(asked, len(prompts))
    jobs = []
    check_prompt_tokens(sum(map(len, prompts)), "prompt" if asked.kind == "completion" else "messages", limits)
    for number, tokens in enumerate(prompts):
        check_token_ids(tokens, model.vocab_size)
        params = _params(asked, _max_tokens(asked, len(tokens), model, pool, limits), bad_words, seeds[number])
        own_id = request_id if len(prompts) == 1 else f"{request_id}-{number}"
        jobs.append(
            Job(own_id, model, keys, asked.cache_salt, tokens, params, asked.priority, timeout_s=asked.timeout_s)
        )
    _check_told(asked, sum(map(len, prompts)), limits)
    _check_repeated(asked, sum(map(len, prompts)), limits)
    if not asked.stream:
        _check_generated(asked, sum(job.params.max_tokens for job in jobs), limits)
    return jobs


def _check_told(asked: GenerationRequest, prompt_tokens: int, limits: Limits) -> None:
    """Raise InvalidRequest if more is to be told of all prompts than one answer may have."""
    top = _prompt_logprobs(asked)
    if top is not None and prompt_tokens * (1 + top) * asked.n > limits.told:
        field = "logprobs" if asked.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidRequest(
            f"{field} asks for {1 + top} log probabilities of each of {counted(prompt_tokens, 'prompt token')}, in "
            f"{counted(asked.n, 'answer')}; this server tells up to {limits.told} of prompts, so ask for fewer of them",
            field,
        )


def _check_repeated(asked: GenerationRequest, prompt_tokens: int, limits: Limits) -> None:
    """Raise InvalidRequest if prompts that are said again in each of their answers would be more than any may be."""
    if asked.n == 1:
        return
    chars = sum(len(prompt) for prompt in asked.prompts if isinstance(prompt, str))
    for field, wanted, count, noun, most in (
        ("echo", asked.echo, chars, "character", limits.prompt_chars),
        ("echo", asked.echo, prompt_tokens, "token", limits.prompt_tokens),
        ("return_token_ids", asked.return_token_ids, prompt_tokens, "token", limits.prompt_tokens),
    ):
        if wanted and count * asked.n > most:
            raise InvalidRequest(
                f"{field} repeats {counted(count, f'prompt {noun}')} in {counted(asked.n, 'answer')}; this server "
                f"repeats up to {most} in all, so lower n or leave {field} out",
                field,
            )


def _check_generated(asked: GenerationRequest, max_tokens: int, limits: Limits) -> None:
    """Raise InvalidRequest if more may be told of all generated tokens than an answer that is one piece may have."""
    if asked.logprobs is not None and max_tokens * (1 + asked.logprobs) * asked.n > limits.told:
        field = "logprobs" if asked.kind == "completion" else "top_logprobs"
        raise InvalidRequest(
            f"{field} asks for {1 + asked.logprobs} log probabilities of each of up to "
            f"{counted(max_tokens, 'generated token')}, in {counted(asked.n, 'answer')}; this server tells up to "
            f"{limits.told} in an answer that is not streamed, so ask for fewer of them, lower max_tokens, or send "
            "stream: true",
            field,
        )


def _max_tokens(asked: GenerationRequest, prompt: int, model: ServedModel, pool: int, limits: Limits) -> int:
    """How many tokens to generate for a prompt of so many. Where only the prompt is asked about it is one, not sent."""
    room = model.max_model_len - prompt
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {counted(prompt, 'token')}; this model takes up to {model.max_model_len - 1}, with one to "
            "generate",
            "prompt" if asked.kind == "completion" else "messages",
        )
    if asked.max_tokens is None:
        most = min(room, pool - prompt)
        if asked.logprobs is not None and not asked.stream:  # as many as can be told of
            most = min(most, limits.told // ((1 + asked.logprobs) * asked.n * len(asked.prompts)))
        return max(1, most)
    if asked.max_tokens > room:
        raise InvalidRequest(
            f"{prompt} prompt tokens and max_tokens {asked.max_tokens} exceed the model's {model.max_model_len}; ask "
            f"for at most {room}",
            "max_tokens",
        )
    return max(1, asked.max_tokens)


def _seeds(asked: GenerationRequest, count: int) -> array:
    """One for each prompt; where none is asked for, prompts that are equal get other answers."""
    if asked.seed is not None:
        return array("Q", [asked.seed]) * count
    return array("Q", secrets.token_bytes(8 * count))


def _params(
    asked: GenerationRequest, max_tokens: int, bad_words: tuple[tuple[int, ...], ...], seed: int
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=asked.logit_bias,
        bad_words=bad_words,
        stop_token_ids=asked.stop_token_ids,
        seed=seed,
        n=asked.n,
        min_tokens=min(asked.min_tokens, max_tokens),
        ignore_eos=asked.ignore_eos,
        logprobs=asked.logprobs,
        prompt_logprobs=_prompt_logprobs(asked),
    )


def _prompt_logprobs(asked: GenerationRequest) -> int | None:
    """How many of the likeliest tokens are wanted beside each of the prompt's, by either way of asking for them."""
    echoed = asked.logprobs if asked.echo else None
    wanted = [count for count in (asked.prompt_logprobs, echoed) if count is not None]
    return max(wanted, default=None)
