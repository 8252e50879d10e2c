"""What parameters do to logits before a token is chosen: bars, biases and penalties.

A step's edits are lists of single entries of its logits, however many rows they are of: each kind is applied by one
gather and one put. Nothing here is as large as the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Draw

NO_TOKENS = np.empty(0, dtype=np.int64)
LEAST_REPETITION = float(np.finfo(np.float32).tiny)


def edits_logits(draw: Draw) -> bool:
    """Whether this draw may ever choose from other logits than the model's own."""
    p = draw.params
    return bool(
        p.logit_bias
        or p.bad_words
        or (p.min_tokens > 0 and draw.stop_ids)
        or _penalises_seen(p)
        or _penalises_generated(p)
    )


def _penalises_seen(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0


def _penalises_generated(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty)


@dataclass(frozen=True, slots=True)
class Fixed:
    """What does not change while a sequence grows. `bad_ends` gives, by the token before it, the last tokens that would
    complete a bad word, each with all the word's tokens before it; `seen` are the prompt's distinct tokens, where
    repetition counts."""

    barred: np.ndarray
    bias_tokens: np.ndarray
    bias: np.ndarray
    bad_ends: dict[int, list[tuple[list[int], int]]]
    seen: np.ndarray


def fixed_of(draw: Draw, vocab: int) -> Fixed:
    """Tokens that the model does not have are left out: it cannot choose them anyway."""
    params = draw.params
    bias: dict[int, float] = {}
    for token, value in params.logit_bias:
        if token < vocab:
            bias[token] = bias.get(token, 0.0) + value
    alone = [word[0] for word in params.bad_words if len(word) == 1 and word[0] < vocab]
    ends: dict[int, list[tuple[list[int], int]]] = {}
    for word in params.bad_words:
        if len(word) > 1 and word[-1] < vocab:
            ends.setdefault(word[-2], []).append((list(word[:-1]), word[-1]))
    seen = NO_TOKENS
    if _penalises_seen(params):
        seen = np.unique(np.array(draw.token_ids[: draw.prompt_len], dtype=np.int64))
    return Fixed(
        np.array(alone, dtype=np.int64),
        np.fromiter(bias, dtype=np.int64, count=len(bias)),
        np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
        ends,
        seen,
    )


@dataclass(frozen=True, slots=True)
class Cells:
    """Entries of a `[W, vocab]` matrix, ordered by row: `rows` and `tokens` int64, `values` float32, one an entry."""

    rows: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def of(self, block: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the entries of rows `first` and on lie in `block`, flattened, and their values, on its device."""
        start, stop = np.searchsorted(self.rows, (first, first + len(block)))
        at = (self.rows[start:stop] - first) * block.shape[1] + self.tokens[start:stop]
        return torch.from_numpy(at).to(block.device), torch.from_numpy(self.values[start:stop]).to(block.device)


@dataclass(frozen=True, slots=True)
class Edits:
    """The edits of one step, or None for a kind that nobody asked for."""

    barred: Cells | None
    bias: Cells | None
    repetition: Cells | None
    penalty: Cells | None

    def apply(self, block: torch.Tensor, first: int) -> None:
        """Change `block` float32 `[r, vocab]`, contiguous: the rows `first` and on of the matrix."""
        flat = block.view(-1)
        if self.barred is not None:
            at, _ = self.barred.of(block, first)
            flat[at] = float("-inf")
        if self.bias is not None:
            at, values = self.bias.of(block, first)
            flat[at] += values
        if self.repetition is not None:
            at, values = self.repetition.of(block, first)
            now = flat[at]
            flat[at] = torch.where(now > 0, now / values, now * values)
        if self.penalty is not None:
            at, values = self.penalty.of(block, first)
            flat[at] -= values


def edits_of(draws: Sequence[Draw], fixed: Sequence[Fixed], vocab: int) -> Edits:
    """The edits of a `[len(draws), vocab]` matrix of logits, each draw's in its row."""
    return Edits(_barred(draws, fixed, vocab), _bias(fixed), _repetition(draws, fixed), _penalty(draws, vocab))


def _barred(draws: Sequence[Draw], fixed: Sequence[Fixed], vocab: int) -> Cells | None:
    rows: list[int] = []
    tokens: list[int] = []
    for row, (draw, its) in enumerate(zip(draws, fixed, strict=True)):
        before, count = draw.token_ids, len(tokens)
        tokens += its.barred.tolist()
        for start, last in its.bad_ends.get(before[-1], ()) if its.bad_ends and before else ():
            if before[-len(start) :] == start:
                tokens.append(last)
        if draw.params.min_tokens > draw.generated:
            tokens += [token for token in draw.stop_ids if token < vocab]
        rows += [row] * (len(tokens) - count)
    if not rows:
        return None
    return Cells(np.array(rows), np.array(tokens), np.zeros(len(rows), dtype=np.float32))


def _bias(fixed: Sequence[Fixed]) -> Cells | None:
    rows = _repeat([len(its.bias) for its in fixed])
    if not len(rows):
        return None
    return Cells(rows, np.concatenate([its.bias_tokens for its in fixed]), np.concatenate([its.bias for its in fixed]))


def _repetition(draws: Sequence[Draw], fixed: Sequence[Fixed]) -> Cells | None:
    """A token may stand here twice, once for the prompt and often for what was generated: each time the same value is
    put, computed from the same logit."""
    on = [_penalises_seen(draw.params) for draw in draws]
    if not any(on):
        return None
    new = _generated(draws, on)
    tokens = [part for its, one in zip(fixed, new, strict=True) for part in (its.seen, np.array(one, dtype=np.int64))]
    values = np.array([max(d.params.repetition_penalty, LEAST_REPETITION) for d in draws], dtype=np.float32)
    rows = _repeat([len(its.seen) + len(one) for its, one in zip(fixed, new, strict=True)])
    return Cells(rows, np.concatenate(tokens), values[rows])


def _penalty(draws: Sequence[Draw], vocab: int) -> Cells | None:
    on = [_penalises_generated(draw.params) for draw in draws]
    if not any(on):
        return None
    new = _generated(draws, on)
    rows = _repeat([len(tokens) for tokens in new])
    tokens = np.fromiter(chain.from_iterable(new), dtype=np.int64, count=len(rows))
    cells, counts = np.unique(rows * vocab + tokens, return_counts=True)
    rows, tokens = np.divmod(cells, vocab)
    presence = np.array([draw.params.presence_penalty for draw in draws])
    frequency = np.array([draw.params.frequency_penalty for draw in draws])
    return Cells(rows, tokens, (presence[rows] + frequency[rows] * counts).astype(np.float32))


def _generated(draws: Sequence[Draw], on: Sequence[bool]) -> list[list[int]]:
    """What each draw's sequence has generated, nothing for those that are not asked about."""
    return [draw.token_ids[draw.prompt_len :] if asked else [] for draw, asked in zip(draws, on, strict=True)]


def _repeat(counts: Sequence[int]) -> np.ndarray:
    """Row numbers, each as often as its count says."""
    return np.repeat(np.arange(len(counts)), counts)
