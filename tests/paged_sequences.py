"""Sequences computed step by step by our runner, each step's logits held to the reference's of the whole sequence."""

import numpy as np
import torch

from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Draw, StepPlan
from kvferry.engine.loading.model import LoadedModel
from kvferry.engine.runner import Runner

TOLERANCE = 1e-4  # of the logits' standard deviation
BLOCK = 16


def plan_of(rows: list[tuple[int, list[int], int, list[int], bool]]) -> StepPlan:
    """Rows of (sequence, new token ids, position of the first, block table, whether to draw)."""
    pages = max(len(table) for *_, table, _ in rows)
    draw_rows = [row for row, (*_, draws) in enumerate(rows) if draws]
    return StepPlan(
        seq_ids=[index for index, *_ in rows],
        token_ids=np.array([token for _, tokens, *_ in rows for token in tokens], dtype=np.int64),
        positions=np.array([position for _, _, position, *_ in rows], dtype=np.int64),
        lengths=np.array([len(tokens) for _, tokens, *_ in rows], dtype=np.int64),
        tables=np.array([table + [0] * (pages - len(table)) for *_, table, _ in rows], dtype=np.int64),
        draw_rows=np.array(draw_rows, dtype=np.int64),
        draws=[Draw(SamplingParams(temperature=0), (), rows[row][1], 1) for row in draw_rows],
        copies=np.empty((0, 2), dtype=np.int64),
    )


class Paged:
    """Sequences of one model in a pool that holds NaN wherever nothing was written, at blocks in random order."""

    def __init__(self, model: LoadedModel, reference, lengths, seed: int = 0, num_blocks: int = 40):
        self._generator = torch.Generator().manual_seed(seed)
        print(f"seed {seed}")
        self._model = model
        self.tokens = [torch.randint(0, 300, (length,), generator=self._generator).tolist() for length in lengths]
        self.done = [0] * len(lengths)
        self._fresh_pool(num_blocks)
        self._expected = []
        with torch.inference_mode():
            for tokens in self.tokens:
                ids = torch.tensor([tokens])
                self._expected.append(reference(ids, attention_mask=torch.ones_like(ids)).logits[0])

    def _fresh_pool(self, num_blocks: int) -> None:
        dtype = getattr(torch, self._model.layout.dtype)
        self.pool = torch.full((num_blocks, *self._model.layout.shape), float("nan"), dtype=dtype)
        self._runner = Runner(self._model, self.pool)
        order = iter(torch.randperm(num_blocks, generator=self._generator).tolist())
        self.tables = [[next(order) for _ in range(-(-len(tokens) // BLOCK))] for tokens in self.tokens]

    def pull_into_another_pool(self) -> None:
        """The bytes of whole blocks go to other blocks of another pool, as a pull does; what was done after them is
        to be done again."""
        before, tables = self.pool, self.tables
        self._fresh_pool(len(before))
        for index, done in enumerate(self.done):
            for old, new in zip(tables[index][: done // BLOCK], self.tables[index], strict=False):
                bytes_of = before[old].view(torch.uint8)
                self.pool[new].view(torch.uint8).copy_(bytes_of)
            self.done[index] = done // BLOCK * BLOCK

    def step(self, **counts: int) -> float:
        """Compute the next `s0=3` tokens of sequence 0, and so on, in one forward. How far the logits after a row's
        last token are from the reference's at most."""
        return max(self.errors(**counts))

    def errors(self, **counts: int) -> list[float]:
        """The same for each row: the largest difference, in deviations of its logits; infinite for NaN."""
        rows, expected = [], []
        for key, count in counts.items():
            index = int(key[1:])
            start, end = self.done[index], self.done[index] + count
            tokens = self.tokens[index][start:end]
            assert len(tokens) == count
            rows.append((index, tokens, start, self.tables[index], True))
            expected.append(self._expected[index][end - 1])
            self.done[index] = end
        got, want = self._runner.logits(plan_of(rows)).float(), torch.stack(expected)
        assert got.shape == want.shape
        off = ((got - want).abs().amax(1) / want.std(dim=1)).nan_to_num(nan=float("inf"))
        return off.tolist()


def greedy(model: LoadedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """What the runner gives when the likeliest token is taken each time: the prompt in two chunks, then one by one."""
    blocks = -(-(len(prompt) + max_tokens) // BLOCK)
    pool = torch.full((blocks, *model.layout.shape), float("nan"))
    runner, table = Runner(model, pool), list(range(blocks))[::-1]
    tokens, start, chunks = list(prompt), 0, [len(prompt) // 2, len(prompt)]
    while len(tokens) < len(prompt) + max_tokens:
        end = chunks.pop(0) if chunks else len(tokens)
        logits = runner.logits(plan_of([(0, tokens[start:end], start, table, True)]))
        start = end
        if end == len(tokens):
            tokens.append(logits[0].argmax().item())
    return tokens[len(prompt) :]
