"""How much one request may ask for in all, beside what each of its fields may be."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`max_choices` bounds prompts times n. `max_told` bounds the log probabilities that are told of prompts, n times
    over: a prompt costs its sender little, and they are shaped while other requests wait. Of a batch, so many prompts
    run side by side that they have no more than `choices_at_once` choices between them, but always one.
    """

    max_n: int = 128
    max_prompts: int = 128
    max_choices: int = 256
    max_told: int = 2**18
    choices_at_once: int = 32


DEFAULT_LIMITS = Limits()
