"""Sequences that each compute one token, as arrays: what a step of decoding needs, carried from step to step."""

from collections import Counter

import numpy as np

from kvferry.engine.sequence import Sequence


class Rows:
    """Some sequences, in order, of one choice each. The sequences are the truth: who changes their tables tells with
    `refit`, who changes anything else makes new rows. Arrays are int64, one entry a sequence."""

    def __init__(self, seqs: list[Sequence]):
        self.seqs = seqs
        self.ids = [seq.id for seq in seqs]
        self.tenants = Counter(seq.tenant for seq in seqs)
        self.draws = [seq.draws[0] for seq in seqs]
        self.table_rows = np.array([seq.table_row for seq in seqs], dtype=np.int64)
        self.positions = np.array([seq.num_computed for seq in seqs], dtype=np.int64)
        self.tokens = np.array([seq.token_ids[-1] for seq in seqs], dtype=np.int64)
        self._room = np.array([len(seq.block_table) * seq.block_size for seq in seqs], dtype=np.int64)
        self._sharing = any(seq.shares_tail for seq in seqs)

    def short(self) -> list[Sequence]:
        """Those whose next token has no block of its own yet."""
        lacking = [self.seqs[i] for i in np.flatnonzero(self.positions >= self._room)]
        return lacking + [seq for seq in self.seqs if seq.shares_tail] if self._sharing else lacking

    def refit(self) -> None:
        """Block tables have grown."""
        for i in np.flatnonzero(self.positions >= self._room):
            self._room[i] = len(self.seqs[i].block_table) * self.seqs[i].block_size
        self._sharing = self._sharing and any(seq.shares_tail for seq in self.seqs)

    def advance(self, tokens: list[int]) -> None:
        """Each has computed its token, and got the next one."""
        self.positions = self.positions + 1
        self.tokens = np.array(tokens, dtype=np.int64)

    def check_integrity(self) -> None:
        """Raises AssertionError when the arrays are not what the sequences say."""
        fresh = Rows(self.seqs)
        for name in ("table_rows", "positions", "tokens", "_room"):
            if getattr(self, name).tolist() != getattr(fresh, name).tolist():
                raise AssertionError(f"{name} of the decoding rows are not those of their sequences")
        if self.draws != fresh.draws or self._sharing < fresh._sharing:
            raise AssertionError("the decoding rows have other draws, or share more, than they know")
