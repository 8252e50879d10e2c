"""How a next token is chosen: declared once, with its defaults, for router, wire and engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """`temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `seed` and `choice` choose the noise, together with
    the absolute position, so the same request draws the same tokens wherever it runs."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    choice: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
