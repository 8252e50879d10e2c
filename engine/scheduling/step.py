"""A step that has been scheduled: who takes part, and the plan that its runner gets."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvferry.engine.batch import Draw, Score, StepPlan
from kvferry.engine.scheduling.block_tables import BlockTables
from kvferry.engine.scheduling.rows import Rows
from kvferry.engine.sequence import Sequence


@dataclass(frozen=True)
class Step:
    """`rows` decode, one token and one draw each; `chunks` compute up to the token named beside them. In the plan the
    former come first."""

    rows: Rows
    chunks: list[tuple[Sequence, int]]

    @cached_property
    def seqs(self) -> list[Sequence]:
        return [*self.rows.seqs, *(seq for seq, _ in self.chunks)]

    @cached_property
    def ids(self) -> set[int]:
        return {seq.id for seq in self.seqs}

    def tokens_by_tenant(self) -> Counter[str]:
        """How many tokens the step computes for whom. To be asked before they count as computed."""
        tokens = self.rows.tenants.copy()
        for seq, end in self.chunks:
            tokens[seq.tenant] += end - seq.num_computed
        return tokens


def draws_of(seq: Sequence, end: int) -> int:
    """How many tokens are drawn after a chunk up to `end`: one for each choice after the last known token, unless they
    are known as well."""
    return len(seq.draws) if end == len(seq.token_ids) and not seq.first_tokens else 0


def scores_of(seq: Sequence, end: int) -> list[int]:
    """The prompt tokens that a chunk up to `end` tells the log probabilities of."""
    return [] if seq.params.prompt_logprobs is None else seq.to_score(end)


def make_plan(step: Step, tables: BlockTables) -> StepPlan:
    """The step as plain data: nothing in it changes while it is in flight."""
    rows, count = step.rows, len(step.rows.seqs)
    ids, positions, tokens, table_rows = rows.ids, rows.positions, rows.tokens, rows.table_rows
    lengths, draws, draw_rows = np.ones(count, dtype=np.int64), rows.draws, np.arange(count)
    scores: list[Score] = []
    if step.chunks:
        seqs = [seq for seq, _ in step.chunks]
        begins, ends = [seq.num_computed for seq in seqs], [end for _, end in step.chunks]
        drawn: list[Draw] = []
        drawn_after: list[int] = []
        for row, (seq, end) in enumerate(step.chunks, start=count):
            if (choices := draws_of(seq, end)) > 0:
                drawn += seq.draws
                drawn_after += [row] * choices
            if asked := scores_of(seq, end):
                scores.append(Score(row, seq.scored - seq.num_computed, asked, seq.params.prompt_logprobs or 0))
        new = [token for seq, end in step.chunks for token in seq.token_ids[seq.num_computed : end]]
        ids, draws = ids + [seq.id for seq in seqs], draws + drawn
        positions = np.concatenate([positions, begins])
        lengths = np.concatenate([lengths, np.subtract(ends, begins)])
        tokens = np.concatenate([tokens, new])
        table_rows = np.concatenate([table_rows, [seq.table_row for seq in seqs]])
        draw_rows = np.concatenate([draw_rows, np.array(drawn_after, dtype=np.int64)])
    block_size = step.seqs[0].block_size
    return StepPlan(
        seq_ids=ids,
        token_ids=tokens,
        positions=positions,
        lengths=lengths,
        tables=tables.gather(table_rows, -(-int((positions + lengths).max()) // block_size)),
        draw_rows=draw_rows,
        draws=draws,
        copies=tables.copies(),
        scores=scores,
    )
