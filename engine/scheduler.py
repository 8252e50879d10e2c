"""Who runs in the next step. Pure bookkeeping over sequences and the page pool: no tensors, no clocks, no I/O.

A sequence is admitted when the pool has blocks for all its tokens and one more; then it is restored (its prefix
pulled), then it runs. Tenants share by weight: who is admitted next, and whose tokens a step computes, is for
fairness.py to say; who is pushed out when places or blocks run short, for preemption.py. Whoever grows at a full pool computes a token in that
very step, and nobody is pushed out for a newcomer twice in a row: each preemption is paid by progress, nothing wedges.
"""

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from itertools import islice, repeat

import numpy as np

from kvferry.common.errors import InvalidRequest, Overloaded
from kvferry.common.sampling import TokenLogprobs
from kvferry.engine.batch import Draw, Outcome, Score, StepPlan
from kvferry.engine.block_tables import BlockTables
from kvferry.engine.fairness import RANK, Tenant, Tenants
from kvferry.engine.page_pool import PagePool
from kvferry.engine.preemption import blocks_of, victim_for_growth, victims_for_admission
from kvferry.engine.sequence import Sequence, Status, TokenEvent


class Scheduler:
    def __init__(self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int, max_waiting: int):
        self._pool = pool
        # Not more than the budget: else tokens of the young could use up every step, and an old prompt would starve.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._budget = max_num_batched_tokens
        self._max_waiting = max_waiting
        self._sequences: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self._tenants = Tenants()
        self._tables = BlockTables()
        self._places = 0  # taken by active sequences; one that will fork into n takes n
        self._step: list[tuple[Sequence, int, int]] = []  # in flight: sequence, where its row ends, its draws
        self._left: Counter[int] = Counter()  # blocks that the step copies from, held until it is done
        self.num_preemptions = 0

    # -- who is here --------------------------------------------------------------------------------------------------

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
        """Queue a new sequence. Ids grow with arrival; one that forks leaves `params.n - 1` free behind its own.

        Raises InvalidRequest if it can never fit, Overloaded if the queue is full.
        """
        known = len(seq.token_ids)  # some of them may be generated already, on a node that is gone
        longest = min(known + seq.limit, seq.prompt_len + seq.params.max_tokens, seq.max_model_len)
        tokens = max(longest, known + 1)
        if -(-tokens // seq.block_size) > self._pool.num_blocks:
            raise InvalidRequest(
                f"the request may need {tokens} tokens of KV, and this node's pool holds "
                f"{self._pool.num_blocks * seq.block_size}; shorten the prompt or lower max_tokens",
                "max_tokens",
            )
        if not self._fits_beside(seq, 0):
            raise InvalidRequest(f"n is {seq.params.n}; this node runs {self.max_num_seqs} at once, and each needs a "
                                 "block of KV beside the prompt's", "n")  # fmt: skip
        if len(self.of(Status.WAITING)) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} requests are waiting on this node already; try again later")
        self._sequences[seq.id] = seq
        self._tenants.enqueue(seq)

    def _fits_beside(self, seq: Sequence, places: int) -> bool:
        """Whether an empty pool would take it beside so many others."""
        n = seq.params.n
        return places + n <= self.max_num_seqs and seq.blocks_needed + n - 1 <= self._pool.num_blocks

    # -- admission ----------------------------------------------------------------------------------------------------

    def admit(self) -> list[Sequence]:
        """Give blocks to waiting sequences, in turn, as far as the pool reaches. They are then restoring."""
        admitted = []
        while (tenant := self._tenants.next_waiting()) is not None:
            seq = tenant.waiting[0]
            reused = self._pool.match(seq.names[: seq.reuse_cap])
            victims = self._who_makes_room(seq, reused)
            if victims is None:
                break
            for victim in victims:
                self.preempt(victim)
            self._activate(tenant.waiting.pop(0), tenant, reused)
            admitted.append(seq)
        return admitted

    def _who_makes_room(self, seq: Sequence, reused: list[int]) -> list[Sequence] | None:
        """The sequences to push out so that this one can be admitted; None if it has to wait.

        Blocks are left to spare, one for each sequence that is active then, so that nobody is pushed out at once.
        """
        places = self._places + seq.params.n - self.max_num_seqs
        wanted = seq.blocks_needed - len(reused)
        blocks = wanted + self._places + seq.params.n - 1 - self._pool.free_beside(reused)
        if places <= 0 and blocks <= 0:
            return []
        kept = set(reused)

        def freed(victim: Sequence) -> int:
            its_own = sum(self._pool.holders(block) == 1 and block not in kept for block in victim.block_table)
            return its_own + victim.params.n

        return victims_for_admission(seq, self._tenants, places, blocks, freed)

    def _activate(self, seq: Sequence, tenant: Tenant, reused: list[int]) -> None:
        self._pool.hold(reused)
        fresh = self._pool.allocate(seq.blocks_needed - len(reused))
        if fresh is None:
            raise AssertionError(f"sequence {seq.id} was let in and there are no blocks for it")
        seq.block_table = reused + fresh
        seq.num_computed = seq.num_reused = len(reused) * seq.block_size
        self._seat(seq, tenant)
        seq.status = Status.RESTORING
        seq.admissions += 1

    def _seat(self, seq: Sequence, tenant: Tenant) -> None:
        seq.table_row = self._tables.take(seq.block_table)
        tenant.active[seq.id] = seq
        self._places += seq.params.n

    def start(self, seq: Sequence) -> None:
        """A restored sequence may run from here on."""
        if seq.status is Status.RESTORING:
            seq.status = Status.RUNNING
            self._running[seq.id] = seq

    # -- a step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step: one row for each sequence that has one token to compute, then chunks of those that have
        more, within the token budget. None when there is nothing to run. Not while a step is in flight."""
        if self._step:
            raise AssertionError("a step is in flight")
        chosen = self._choose()
        copies = self._reach(chosen)
        step = [(seq, end) for seq, end in chosen if seq.status is Status.RUNNING]
        if not step:
            self._end_step()
            return None
        return self._plan(step, copies)

    def _choose(self) -> list[tuple[Sequence, int]]:
        """Who runs, and up to which token."""
        decoding, extending = [], []
        for seq in self._running.values():
            (extending if len(seq.token_ids) - seq.num_computed > 1 else decoding).append(seq)
        if not extending and len(decoding) <= self._budget:
            return [(seq, len(seq.token_ids)) for seq in decoding]
        extending.sort(key=RANK)
        budgets = self._budgets(decoding + extending)
        chosen = []
        for seq in decoding + extending:
            if (budget := budgets[seq.tenant]) > 0:
                end = seq.next_chunk(budget)
                budgets[seq.tenant] -= end - seq.num_computed
                chosen.append((seq, end))
        return chosen

    def _budgets(self, seqs: list[Sequence]) -> Counter[str]:
        wanted: Counter[str] = Counter()
        for seq in seqs:
            wanted[seq.tenant] += len(seq.token_ids) - seq.num_computed
        return self._tenants.split(self._budget, wanted)

    def _reach(self, chosen: list[tuple[Sequence, int]]) -> list[tuple[int, int]]:
        """Make the block tables cover what will be computed, each in a block of its own, pushing sequences out if need
        be; the (from, to) copies that this takes. The smallest holders go first, so that the others pay."""
        short = [(s, end) for s, end in chosen if len(s.block_table) * s.block_size < end or s.shares_tail]
        if not short:
            return []
        short.sort(key=lambda pair: pair[0].rank)
        if len(self._tenants.busy) > 1:
            tenants = {seq.tenant: self._tenants[seq.tenant] for seq, _ in short}
            held = {name: blocks_of(tenant.active.values()) / tenant.weight for name, tenant in tenants.items()}
            short.sort(key=lambda pair: held[pair[0].tenant])
        copies = []
        for seq, end in short:
            while seq.status is Status.RUNNING and len(seq.block_table) * seq.block_size < end:
                if (block := self._take_block(seq)) is not None:
                    self._tables.put(seq.table_row, len(seq.block_table), block)
                    seq.block_table.append(block)
            if seq.status is Status.RUNNING and seq.shares_tail and (pair := self._own_tail(seq)):
                copies.append((seq, pair))
        return [pair for seq, pair in copies if seq.status is Status.RUNNING]

    def _own_tail(self, seq: Sequence) -> tuple[int, int] | None:
        """Copy on write: the block that is written next leaves the tables of others; who is the last one in it keeps
        it. The copy that is to be made, if any."""
        index = seq.blocks_computed
        shared = seq.block_table[index]
        if self._pool.holders(shared) - self._left[shared] > 1:
            if (own := self._take_block(seq)) is None:
                return None
            seq.block_table[index] = own
            self._tables.put(seq.table_row, index, own)
            self._left[shared] += 1
            seq.shares_tail = False
            return (shared, own)
        seq.shares_tail = False
        return None

    def _take_block(self, seq: Sequence) -> int | None:
        """A block for a running sequence; None when it was pushed out for the lack of one."""
        while (blocks := self._pool.allocate(1)) is None:
            victim = victim_for_growth(seq, self._tenants)
            self.preempt(victim)
            if victim is seq:
                return None
        return blocks[0]

    def _plan(self, step: list[tuple[Sequence, int]], copies: list[tuple[int, int]]) -> StepPlan:
        token_ids: list[int] = []
        draws: list[Draw] = []
        draw_rows: list[int] = []
        for row, (seq, end) in enumerate(step):
            seq.in_flight = True
            token_ids += seq.token_ids[seq.num_computed : end]
            count = 0
            if end == len(seq.token_ids) and not seq.first_tokens:
                count = len(seq.draws)
                draws += seq.draws
                draw_rows += [row] * count
            self._step.append((seq, end, count))
        scores = [
            Score(row, seq.scored - seq.num_computed, asked, seq.params.prompt_logprobs or 0)
            for row, (seq, end) in enumerate(step)
            if seq.params.prompt_logprobs is not None and (asked := seq.to_score(end))
        ]
        ends = np.array([end for _, end in step])
        positions = np.array([seq.num_computed for seq, _ in step])
        pages = -(-int(ends.max()) // step[0][0].block_size)
        return StepPlan(
            seq_ids=[seq.id for seq, _ in step],
            token_ids=np.array(token_ids),
            positions=positions,
            lengths=ends - positions,
            tables=self._tables.gather([seq.table_row for seq, _ in step], pages),
            draw_rows=np.array(draw_rows, dtype=np.int64),
            draws=draws,
            copies=np.array(copies, dtype=np.int64).reshape(-1, 2),
            scores=scores,
        )

    def finish_step(self, outcome: Outcome) -> list[TokenEvent]:
        """Take a step's outcome in: what it did for each sequence, in order. Who has come to its end is finished then.

        Sequences that were withdrawn during the step give their blocks back and are left out.
        """
        step = self._end_step()
        self._tenants.charge((seq.tenant for seq, _, _ in step), (end - seq.num_computed for seq, end, _ in step))
        events: list[TokenEvent] = []
        drawn = zip(outcome.tokens, outcome.logprobs or repeat(None), strict=False)
        scores = iter(outcome.prompt_logprobs)
        for seq, end, count in step:
            told = next(scores) if seq.params.prompt_logprobs is not None and seq.to_score(end) else ()
            tokens = list(islice(drawn, count))
            if seq.withdrawn:
                self.withdraw(seq)
                continue
            first = seq.blocks_computed
            seq.advance(end - seq.num_computed)
            for index in range(first, seq.blocks_computed):
                self._pool.name(seq.block_table[index], seq.names[index])
            seq.scored += len(told)
            if count == 0:
                events.append(TokenEvent(seq, seq.params.choice, prompt_logprobs=told))
                if seq.first_tokens and seq.num_computed == len(seq.token_ids):
                    events += self._fork_known(seq)
            elif count == 1:
                events.append(self._take_token(seq, *tokens[0], told))
            elif seq.generated_here + 1 >= seq.limit:
                events += self._end_with_choices(seq, tokens, told)
            else:
                events += [
                    self._take_token(one, *drawn_token, told if one is seq else ())
                    for one, drawn_token in zip(self._fork(seq, range(count)), tokens, strict=True)
                ]
        return events

    def _take_token(
        self, seq: Sequence, token: int, logprobs: TokenLogprobs | None, told: tuple[TokenLogprobs, ...]
    ) -> TokenEvent:
        seq.append(token)
        seq.generated_here += 1
        reason = seq.finish_reason(token)
        if reason or seq.generated_here >= seq.limit:
            self._finish(seq)
        return TokenEvent(seq, seq.params.choice, token, reason, logprobs, told)

    def _end_with_choices(
        self, seq: Sequence, tokens: list[tuple[int, TokenLogprobs | None]], told: tuple[TokenLogprobs, ...]
    ) -> list[TokenEvent]:
        """The last token here, of each choice: there is nothing to fork for."""
        choices = [draw.params.choice for draw in seq.draws]
        seq.append(tokens[0][0])
        seq.generated_here += 1
        self._finish(seq)
        return [
            TokenEvent(seq, choice, token, seq.finish_reason(token), logprobs, told if choice == choices[0] else ())
            for choice, (token, logprobs) in zip(choices, tokens, strict=True)
        ]

    def _fork_known(self, seq: Sequence) -> list[TokenEvent]:
        """Its choices go on from first tokens that somebody else has chosen, and told."""
        known = seq.first_tokens
        branches = self._fork(seq, [choice - seq.params.choice for choice, _ in known])
        for branch, (_, token) in zip(branches, known, strict=True):
            branch.append(token)
        return [TokenEvent(branch, branch.params.choice) for branch in branches[1:]]

    def _fork(self, seq: Sequence, offsets: Iterable[int]) -> list[Sequence]:
        """Split a running sequence into choices, the first of which it is itself. All stand in the same blocks; the
        last one, if it is partial, is copied once somebody writes to it."""
        first, *others = offsets
        self._places -= seq.params.n - 1
        seq.shares_tail = seq.num_computed % seq.block_size > 0
        branches = [seq.fork(offset) for offset in others]
        seq.become(first)
        for branch in branches:
            self._sequences[branch.id] = self._running[branch.id] = branch
            self._pool.hold(branch.block_table)
            self._seat(branch, self._tenants[branch.tenant])
        return [seq, *branches]

    def abandon_step(self) -> list[Sequence]:
        """The step failed: its sequences are finished. Those that were not withdrawn meanwhile."""
        failed = []
        for seq, _, _ in self._end_step():
            self._finish(seq)
            if seq.withdrawn:
                self.withdraw(seq)
            else:
                failed.append(seq)
        return failed

    def _end_step(self) -> list[tuple[Sequence, int, int]]:
        step, self._step = self._step, []
        for seq, _, _ in step:
            seq.in_flight = False
        if self._left:
            left, self._left = self._left, Counter()
            self._pool.release(list(left.elements()))
        return step

    # -- leaving ------------------------------------------------------------------------------------------------------

    def preempt(self, seq: Sequence) -> None:
        """Take all blocks from a sequence and let it wait again. What it has computed stays findable by name."""
        tenant = self._tenants[seq.tenant]
        self._unseat(seq)
        self._drop_blocks(seq)
        seq.num_reused = 0
        seq.status = Status.WAITING
        insort(tenant.waiting, seq, key=RANK)
        self.num_preemptions += 1

    def _finish(self, seq: Sequence) -> None:
        """It is done, and keeps its blocks until it is withdrawn."""
        self._unseat(seq)
        seq.status = Status.FINISHED

    def withdraw(self, seq: Sequence) -> None:
        """Forget a sequence and free what it holds; if a step is using it, once that step is done. May be repeated."""
        if seq.id not in self._sequences:
            return
        seq.withdrawn = True
        if seq.in_flight:
            return
        if seq.status is Status.WAITING:
            self._tenants[seq.tenant].waiting.remove(seq)
        elif seq.status is not Status.FINISHED:
            self._unseat(seq)
        self._drop_blocks(seq)
        seq.status = Status.FINISHED
        del self._sequences[seq.id]

    def _unseat(self, seq: Sequence) -> None:
        """Give back its place among the active ones."""
        self._tables.give(seq.table_row)
        seq.table_row = -1
        self._running.pop(seq.id, None)
        del self._tenants[seq.tenant].active[seq.id]
        self._places -= seq.params.n

    def _drop_blocks(self, seq: Sequence) -> None:
        self._pool.release(seq.block_table)
        seq.block_table = []
        seq.filled = set()
        seq.num_computed = 0
        seq.shares_tail = False

    def check_integrity(self) -> None:
        """Raises AssertionError when block tables, states and counts disagree."""
        self._pool.check_integrity(seq.block_table for seq in self._sequences.values())
        active = self.of(Status.RESTORING, Status.RUNNING)
        if self._places != sum(seq.params.n for seq in active):
            raise AssertionError(f"{self._places} places are taken by {len(active)} active sequences")
        if [*sorted(self._running)] != [seq.id for seq in active if seq.status is Status.RUNNING]:
            raise AssertionError("the running sequences are not those whose state says so")
        self._tenants.check_integrity(self._sequences.values())
        for seq in self._sequences.values():
            held = len(seq.block_table)
            problem = (
                (seq.status is Status.WAITING and held and "waits and holds blocks")
                or (len(set(seq.block_table)) != held and "holds a block twice")
                or (held * seq.block_size < seq.num_computed and "has computed more than it holds")
                or (len(seq.names) != len(seq.token_ids) // seq.block_size and "has unnamed full blocks")
                or (self._tables.differs(seq.table_row, seq.block_table) and "has another table in its row")
            )
            if problem:
                raise AssertionError(f"sequence {seq.id} ({seq.status.value}) {problem}")
