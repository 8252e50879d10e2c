"""What crosses from the scheduler to the runner: plain data, no queues, and nothing that a step in flight could see
change."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from kvferry.common.sampling import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """How the tokens of one sequence are chosen. It lives as long as the sequence and is the same object in each step.

    `token_ids` is the sequence's own list, prompt first; it does not change while a step is in flight. `stop_ids` are
    the tokens that would end the sequence (barred until `min_tokens` have been generated).
    """

    params: SamplingParams
    stop_ids: tuple[int, ...]
    token_ids: list[int]
    prompt_len: int

    @property
    def position(self) -> int:
        """The absolute index of the token that is to be chosen."""
        return len(self.token_ids)

    @property
    def generated(self) -> int:
        """How many tokens came before it since the prompt."""
        return len(self.token_ids) - self.prompt_len


@dataclass(frozen=True, slots=True)
class Score:
    """Tell the log probabilities of known tokens: of `token_ids[i]` by the logits after token `first + i` of row `row`,
    each with the `top` likeliest tokens beside it."""

    row: int
    first: int
    token_ids: list[int]
    top: int


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One forward of the model: R rows, at most one a sequence, T tokens in all. Integer arrays are int64.

    Row r computes the next `lengths[r]` of `token_ids [T]`, at positions from `positions[r]` on, of the sequence
    `seq_ids[r]`. Its KV lies in the blocks `tables[r]`, which cover every position up to the last new one; entries
    after those mean nothing. `draws[i]` chooses a token after the last one of row `draw_rows[i]`; a row may have none,
    or several. Before anything is written, block `copies[i, 0]` is copied to `copies[i, 1]`. `scores` are tokens to
    score.
    """

    seq_ids: list[int]
    token_ids: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    tables: np.ndarray
    draw_rows: np.ndarray
    draws: list[Draw]
    copies: np.ndarray
    scores: Sequence[Score] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step gave: for each draw a token, and what is told of it where that was asked for (`logprobs` is None when
    nobody asked); for each score, what is told of its tokens. What stands there for `failed_rows`, whose logits are not
    numbers, means nothing."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: Sequence[list[TokenLogprobs]] = ()
    failed_rows: Collection[int] = ()
