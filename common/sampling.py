"""How a next token is chosen: declared once, with its defaults, for router, wire and engine."""

from dataclasses import dataclass

WEIGHTS = (1e-3, 1e3)  # the least and the most that a tenant's share may be of another's


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """`temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0, penalties 0 and `repetition_penalty` 1 are off.

    `seed` and `choice` choose the noise, together with the absolute position, so the same request draws the same tokens
    wherever it runs. `n` answers are given, as the choices `choice .. choice + n - 1`. `logit_bias` pairs token ids
    with what is added to their logits; `bad_words` are token sequences that are never completed. `logprobs` and
    `prompt_logprobs` say how many of the likeliest tokens are told beside each one; None is not to tell any.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    choice: int = 0
    n: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's natural log probability by the model's own logits, before any parameter; its rank among all tokens
    (0 is the likeliest, ties by id), and the likeliest tokens as (id, log probability), best first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()
