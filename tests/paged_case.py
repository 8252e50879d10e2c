"""Ragged batches over paged KV, drawn by Hypothesis, and attention over them written out as sums in float64."""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from hypothesis import strategies as st

from kvferry.kernels.reference import Ragged, first_seen, kv_write

LAYERS = 3


@dataclass(frozen=True)
class Case:
    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    rows: tuple[tuple[int, int], ...]  # cached, new
    seed: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


def cases(
    new: st.SearchStrategy[int], groups: tuple[int, ...], head_dims: tuple[int, ...], most_rows: int
) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        kv_heads=st.integers(1, 3),
        group=st.sampled_from(groups),
        head_dim=st.sampled_from(head_dims),
        block_size=st.sampled_from([1, 2, 4, 16]),
        rows=st.lists(st.tuples(st.integers(0, 35), new), min_size=1, max_size=most_rows).map(tuple),
        seed=st.integers(0, 2**16),
        window=st.sampled_from([None, None, 1, 3, 16, 40]),
        softcap=st.sampled_from([None, None, 0.5, 20.0]),
        sinks=st.booleans(),
    )


CASES = cases(st.integers(1, 20), (1, 2, 3, 4), (1, 4, 5, 16), most_rows=4)
DECODE_CASES = cases(st.just(1), (1, 2, 3, 4, 5, 7, 8, 12), (1, 5, 16, 64, 72, 80, 100, 128), most_rows=9)


class Paged:
    """A case's keys and values, dense and in a pool that holds NaN in every other slot; blocks in random order. Table
    entries after a row's own blocks name a block of nothing but NaN."""

    def __init__(self, case: Case, layer: int):
        self.case, self.layer = case, layer
        self.generator = torch.Generator().manual_seed(case.seed)
        self.contexts = [cached + new for cached, new in case.rows]
        self.lengths = [new for _, new in case.rows]
        pages = [-(-context // case.block_size) for context in self.contexts]
        shape = (sum(pages) + 2, case.kv_heads, LAYERS, 2, case.block_size, case.head_dim)
        self.pool = torch.full(shape, float("nan"), dtype=torch.float64)
        order = torch.randperm(len(self.pool), generator=self.generator)
        self.tables = list(order[: sum(pages)].split(pages))
        padded = order[-1].repeat(len(pages), max(pages) + 2)
        for row, table in zip(padded, self.tables, strict=True):
            row[: len(table)] = table
        self.keys = [self.random(context, case.kv_heads) for context in self.contexts]
        self.values = [self.random(context, case.kv_heads) for context in self.contexts]
        self.starts = [0, *accumulate(self.lengths)][:-1]
        self.ragged = Ragged(*(torch.tensor(x) for x in (self.starts, self.lengths, self.contexts)), padded)
        heads = case.kv_heads * case.group
        self.query = self.random(sum(self.lengths), heads)
        self.sinks = self.random(1, heads)[0, :, 0] if case.sinks else None

    def random(self, tokens: int, heads: int) -> torch.Tensor:
        shape = (tokens, heads, self.case.head_dim)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def slots(self) -> torch.Tensor:
        """Where the tokens of all rows belong, from position 0 on, rows end to end."""
        size = self.case.block_size
        per_row = []
        for context, table in zip(self.contexts, self.tables, strict=True):
            positions = torch.arange(context)
            per_row.append(table[positions // size] * size + positions % size)
        return torch.cat(per_row)

    def write(self) -> None:
        """All sequences at once, in one ragged call; then what no token of a windowed row can see is lost again."""
        kv_write(self.pool, self.layer, self.slots(), torch.cat(self.keys), torch.cat(self.values))
        self.lose_what_is_not_seen()

    def lose_what_is_not_seen(self) -> None:
        for (cached, _), table in zip(self.case.rows, self.tables, strict=True):
            self.pool[table[: first_seen(cached, self.case.window) // self.case.block_size]] = float("nan")

    def told(self) -> tuple[int | None, float | None, torch.Tensor | None]:
        """The last arguments of an attention call."""
        return self.case.window, self.case.softcap, self.sinks

    def attended(self, scale: float) -> torch.Tensor:
        """softmax(q k^T scale) v over the tokens up to and with each one's own position."""
        out = torch.empty_like(self.query)
        for i, (cached, new) in enumerate(self.case.rows):
            for token in range(new):
                last = cached + token
                seen = slice(first_seen(last, self.case.window), last + 1)
                for head in range(self.query.shape[1]):
                    key, value = (kv[i][seen, head // self.case.group] for kv in (self.keys, self.values))
                    weights = [
                        self.weight(s) for s in (key @ self.query[self.starts[i] + token, head] * scale).tolist()
                    ]
                    total = sum(weights) + (math.exp(self.sinks[head]) if self.sinks is not None else 0)
                    out[self.starts[i] + token, head] = torch.tensor(weights, dtype=torch.float64) / total @ value
        return out

    def weight(self, score: float) -> float:
        cap = self.case.softcap
        return math.exp(score if cap is None else cap * math.tanh(score / cap))
