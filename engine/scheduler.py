"""Who runs in the next step. Pure bookkeeping over sequences and the page pool: no tensors, no clocks, no I/O.

A sequence is admitted, first come first served, when the pool has blocks for all its tokens and one more; then it is
restored (its prefix pulled), then it runs. Only a decode step can ask for more: when the pool has none left, the
youngest sequence gives its blocks back and waits again, one that is still being restored before one that runs.
Because every sequence can only push out younger ones, the oldest always gets on: nothing starves, nothing wedges.
"""

from kvferry.common.errors import InvalidRequest, Overloaded
from kvferry.engine.batch import Row, StepPlan
from kvferry.engine.page_pool import PagePool
from kvferry.engine.sequence import Sequence, Status


class Scheduler:
    def __init__(self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int, max_waiting: int):
        self._pool = pool
        # Not more than the budget: else tokens of the young could use up every step, and an old prompt would starve.
        self._max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._budget = max_num_batched_tokens
        self._max_waiting = max_waiting
        self._sequences: dict[int, Sequence] = {}
        self.num_preemptions = 0

    def of(self, *statuses: Status) -> list[Sequence]:
        """The sequences in these states, oldest first."""
        return [seq for _, seq in sorted(self._sequences.items()) if seq.status in statuses]

    def __contains__(self, seq: Sequence) -> bool:
        return seq.id in self._sequences

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that are queued or being restored, and not computed."""
        pending = self.of(Status.WAITING, Status.RESTORING, Status.RUNNING)
        return sum(len(s.token_ids) - s.num_computed for s in pending if len(s.token_ids) - s.num_computed > 1)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; ids must grow with arrival.

        Raises InvalidRequest if it can never fit, Overloaded if the queue is full.
        """
        known = len(seq.token_ids)  # some of them may be generated already, on a node that is gone
        longest = min(known + seq.limit, seq.prompt_len + seq.params.max_tokens, seq.max_model_len)
        tokens = max(longest, known + 1)
        blocks = -(-tokens // seq.block_size)
        if blocks > self._pool.num_blocks:
            raise InvalidRequest(
                f"the request may need {tokens} tokens of KV, and this node's pool holds "
                f"{self._pool.num_blocks * seq.block_size}; shorten the prompt or lower max_tokens",
                "max_tokens",
            )
        if len(self.of(Status.WAITING)) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} requests are waiting on this node already; try again later")
        self._sequences[seq.id] = seq

    def admit(self) -> list[Sequence]:
        """Give blocks to the waiting sequences, oldest first, as far as the pool reaches. They are then restoring."""
        admitted = []
        active = len(self.of(Status.RESTORING, Status.RUNNING))
        for seq in self.of(Status.WAITING):
            if active >= self._max_num_seqs or not self._give_blocks(seq, spare=active):
                break
            seq.status = Status.RESTORING
            seq.admissions += 1
            active += 1
            admitted.append(seq)
        return admitted

    def _give_blocks(self, seq: Sequence, spare: int) -> bool:
        """Hold the pool's blocks of its prefix and fresh ones for the rest; leaves `spare` blocks for the sequences
        that are active, so that admitting one does not push out another at once."""
        reused = self._pool.match(seq.names[: seq.reuse_cap])
        wanted = seq.blocks_needed - len(reused)
        if self._pool.free_beside(reused) < wanted + spare:
            return False
        self._pool.hold(reused)
        seq.block_table = reused + (self._pool.allocate(wanted) or [])
        seq.num_computed = seq.num_reused = len(reused) * seq.block_size
        return True

    def start(self, seq: Sequence) -> None:
        """A restored sequence may run from here on."""
        if seq.status is Status.RESTORING:
            seq.status = Status.RUNNING

    def schedule(self) -> StepPlan | None:
        """The next step: one row for each sequence that has one token to compute, then chunks of those that have
        more, within the token budget. None when there is nothing to run. Not while a step is in flight."""
        running = self.of(Status.RUNNING)
        decoding = [seq for seq in running if len(seq.token_ids) - seq.num_computed == 1]
        extending = [seq for seq in running if len(seq.token_ids) - seq.num_computed > 1]
        budget = self._budget
        chosen: list[tuple[Sequence, int]] = []
        for seq in decoding + extending:
            # A sequence that was pushed out since the lists were made is not running any more.
            if budget > 0 and seq.status is Status.RUNNING:
                end = seq.next_chunk(budget)
                if self._reach(seq, end):
                    budget -= end - seq.num_computed
                    seq.in_flight = True
                    chosen.append((seq, end))
        rows = tuple(self._row(seq, end) for seq, end in chosen)
        return StepPlan(rows) if rows else None

    def _row(self, seq: Sequence, end: int) -> Row:
        new = tuple(seq.token_ids[seq.num_computed : end])
        draw = seq.draw() if end == len(seq.token_ids) else None
        return Row(seq.id, new, seq.num_computed, tuple(seq.block_table), draw)

    def _reach(self, seq: Sequence, end: int) -> bool:
        """Make the block table cover `end` tokens, pushing out younger sequences if need be, itself at the last."""
        while len(seq.block_table) * seq.block_size < end:
            if (more := self._pool.allocate(1)) is not None:
                seq.block_table += more
                continue
            younger = [s for s in self._holding() if s.id > seq.id and not s.in_flight]
            victim = younger[0] if younger else seq
            self.preempt(victim)
            if victim is seq:
                return False
        return True

    def _holding(self) -> list[Sequence]:
        """Who could give blocks back, the best victim first: half-restored before running, the youngest first."""
        return self.of(Status.RESTORING)[::-1] + self.of(Status.RUNNING)[::-1]

    def preempt(self, seq: Sequence) -> None:
        """Take all blocks from a sequence and let it wait again. What it has computed stays findable by name."""
        self._drop_blocks(seq)
        seq.num_reused = 0
        seq.status = Status.WAITING
        self.num_preemptions += 1

    def finish_step(self, plan: StepPlan, tokens: list[int | None]) -> list[tuple[Sequence, int | None, str | None]]:
        """Take a step's outcome in: for each row its sequence, the token it gave, and why that ends it.

        Sequences that were withdrawn during the step give their blocks back and are left out.
        """
        outcomes = []
        for row, token in zip(plan.rows, tokens, strict=True):
            seq = self._sequences[row.seq_id]
            seq.in_flight = False
            if seq.withdrawn:
                self.withdraw(seq)
                continue
            before = seq.blocks_computed
            seq.advance(len(row.token_ids))
            for index in range(before, seq.blocks_computed):
                self._pool.name(seq.block_table[index], seq.names[index])
            reason = None
            if token is not None:
                seq.append(token)
                seq.generated_here += 1
                reason = seq.finish_reason(token)
                if reason or seq.generated_here >= seq.limit:
                    seq.status = Status.FINISHED
            outcomes.append((seq, token, reason))
        return outcomes

    def abandon_step(self, plan: StepPlan) -> None:
        """A step failed: its sequences are not in flight any more, and are finished."""
        for row in plan.rows:
            seq = self._sequences[row.seq_id]
            seq.in_flight = False
            seq.status = Status.FINISHED
            if seq.withdrawn:
                self.withdraw(seq)

    def withdraw(self, seq: Sequence) -> None:
        """Forget a sequence and free what it holds; if a step is using it, once that step is done. May be repeated."""
        if seq.id not in self._sequences:
            return
        seq.withdrawn = True
        if not seq.in_flight:
            self._drop_blocks(seq)
            seq.status = Status.FINISHED
            del self._sequences[seq.id]

    def _drop_blocks(self, seq: Sequence) -> None:
        self._pool.release(seq.block_table)
        seq.block_table = []
        seq.filled = set()
        seq.num_computed = 0

    def check_integrity(self) -> None:
        """Raises AssertionError when block tables and states disagree."""
        self._pool.check_integrity(seq.block_table for seq in self._sequences.values())
        for seq in self._sequences.values():
            held = len(seq.block_table)
            problem = (
                (seq.status is Status.WAITING and held and "waits and holds blocks")
                or (len(set(seq.block_table)) != held and "holds a block twice")
                or (held * seq.block_size < seq.num_computed and "has computed more than it holds")
                or (len(seq.names) != len(seq.token_ids) // seq.block_size and "has unnamed full blocks")
            )
            if problem:
                raise AssertionError(f"sequence {seq.id} ({seq.status.value}) {problem}")
