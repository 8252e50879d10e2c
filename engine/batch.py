"""What crosses from the scheduler to the runner: plain data, no tensors, no queues."""

from dataclasses import dataclass

from kvferry.common.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to choose: `position` is its absolute index in the sequence, `generated` how many came before it
    since the prompt, `stop_ids` the tokens that would end the sequence (barred until `min_tokens`)."""

    params: SamplingParams
    position: int
    generated: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Compute `token_ids` at positions `start ..` of one sequence, whose KV lies in `block_table`.

    The table covers every position up to the last new one. `draw` is set when the row's last token is the last one
    known, so that a next one is to be chosen.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    draw: Draw | None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward of the model. At most one row a sequence."""

    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)
