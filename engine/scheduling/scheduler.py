"""Who runs in the next step. Pure bookkeeping over sequences and the page pool: no tensors, no clocks, no I/O.

A sequence is admitted when the pool has blocks for all its tokens and one more; then it is restored (its prefix
pulled), then it runs. Tenants share by weight: who is admitted next, and whose tokens a step computes, is for
fairness.py to say; who is pushed out when places or blocks run short, for preemption.py. Whoever grows at a full pool
computes a token in that very step, and nobody is pushed out for a newcomer twice in a row: each preemption is paid by
progress, and nothing wedges.
"""

from bisect import insort
from collections.abc import Collection, Iterable
from itertools import islice, repeat

from kvferry.common.sampling import TokenLogprobs
from kvferry.engine.batch import Outcome, StepPlan
from kvferry.engine.page_pool import PagePool
from kvferry.engine.scheduling.admission import check_fits, may_pass, who_leaves_the_line
from kvferry.engine.scheduling.block_tables import BlockTables
from kvferry.engine.scheduling.fairness import RANK, Tenant, Tenants
from kvferry.engine.scheduling.preemption import victim_for_growth, victims_for_admission
from kvferry.engine.scheduling.rows import Rows
from kvferry.engine.scheduling.sharing import share_out
from kvferry.engine.scheduling.step import Step, draws_of, make_plan, scores_of
from kvferry.engine.sequence import Sequence, Status, TokenEvent


class Scheduler:
    def __init__(self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int, max_waiting: int):
        self._pool = pool
        # Not more than the budget: else tokens of the young could use up every step, and an old prompt would starve.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._budget = max_num_batched_tokens
        self._max_waiting = max_waiting
        self._sequences: dict[int, Sequence] = {}
        # Those that run: with one token to compute, and one choice; with more.
        self._decoding: dict[int, Sequence] = {}
        self._extending: dict[int, Sequence] = {}
        self._rows: Rows | None = None  # of all that are decoding, where that has not changed
        self._tenants = Tenants()
        self._tables = BlockTables(pool)
        self._places = 0  # taken by active sequences; one that will fork into n takes n
        self._step: Step | None = None  # in flight
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

    def add(self, seq: Sequence) -> Sequence | None:
        """Queue a new sequence. Ids grow with arrival; one that forks leaves `params.n - 1` free behind its own.

        Raises InvalidRequest if it can never fit, Overloaded if the lines are full. Where they are full of another
        tenant's, one of those leaves instead: it is returned, withdrawn.
        """
        check_fits(seq, self._pool.num_blocks, self.max_num_seqs)
        if (leaving := who_leaves_the_line(seq, self._tenants, self._max_waiting)) is not None:
            self.withdraw(leaving)
        self._sequences[seq.id] = seq
        self._tenants.enqueue(seq)
        return leaving

    # -- admission ----------------------------------------------------------------------------------------------------

    def admit(self) -> list[Sequence]:
        """Give blocks to waiting sequences, in turn, as far as the pool reaches. They are then restoring."""
        admitted: list[Sequence] = []
        blocked: list[Tenant] = []
        while (tenant := self._tenants.next_waiting(blocked)) is not None:
            seq = tenant.waiting[0]
            reused = self._pool.match(seq.names[: seq.reuse_cap])
            victims = self._who_makes_room(seq, reused)
            if victims is None or (blocked and (victims or not self._may_pass(seq, blocked[0].waiting[0]))):
                blocked.append(tenant)
                continue
            for victim in victims:
                self.preempt(victim)
            self._activate(tenant.waiting.pop(0), tenant, reused)
            admitted.append(seq)
        return admitted

    def _may_pass(self, seq: Sequence, first: Sequence) -> bool:
        return may_pass(seq, first, self._tenants, self._pool.num_blocks, self.max_num_seqs, self._tables.held)

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

        return victims_for_admission(seq, self._tenants, places, blocks, freed, self.in_flight, self._tables.held)

    def _activate(self, seq: Sequence, tenant: Tenant, reused: list[int]) -> None:
        self._tables.open(seq, reused)
        seq.num_computed = seq.num_reused = len(reused) * seq.block_size
        seq.status = Status.RESTORING
        seq.admissions += 1
        tenant.active[seq.id] = seq
        self._places += seq.params.n

    def start(self, seq: Sequence) -> None:
        """A restored sequence may run from here on."""
        if seq.status is Status.RESTORING:
            seq.status = Status.RUNNING
            self._run(seq)

    def _run(self, seq: Sequence) -> None:
        """Put a running sequence among those that decode, or those that have more to compute."""
        if len(seq.token_ids) - seq.num_computed == 1 and seq.params.n == 1:
            self._extending.pop(seq.id, None)
            self._decoding[seq.id] = seq
            self._rows = None
            seq.set_due()
        else:
            self._extending[seq.id] = seq

    def in_flight(self, seq: Sequence) -> bool:
        """Whether a step is computing for it right now."""
        return self._step is not None and seq.id in self._step.ids

    def members(self, group: int) -> list[Sequence]:
        """The sequences that a request has become and that have not been withdrawn."""
        return [seq for seq in self._sequences.values() if seq.group == group]

    # -- a step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step: one row for each sequence that has one token to compute, then chunks of those that have
        more, within the token budget. None when there is nothing to run. Not while a step is in flight."""
        if self._step is not None:
            raise AssertionError("a step is in flight")
        rows, chunks = self._choose()
        before = self.num_preemptions
        self._reach(rows, chunks)
        if self.num_preemptions > before:
            rows = Rows([seq for seq in rows.seqs if seq.status is Status.RUNNING])
            chunks = [(seq, end) for seq, end in chunks if seq.status is Status.RUNNING]
        if not rows.seqs and not chunks:
            self._tables.copies_are_made()
            return None
        self._step = Step(rows, chunks)
        return make_plan(self._step, self._tables)

    def _choose(self) -> tuple[Rows, list[tuple[Sequence, int]]]:
        """Who decodes, and who computes a chunk, up to which token."""
        if self._rows is None:
            self._rows = Rows(list(self._decoding.values()))
        if not self._extending and len(self._decoding) <= self._budget:
            return self._rows, []
        decoding, chunks = share_out(self._rows.seqs, list(self._extending.values()), self._tenants, self._budget)
        if len(decoding) == len(self._decoding):
            return self._rows, chunks
        self._rows = None
        return Rows(decoding), chunks

    def _reach(self, rows: Rows, chunks: list[tuple[Sequence, int]]) -> None:
        """Make the block tables cover what will be computed, each in a block of its own, pushing sequences out if need
        be. The smallest holders go first, so that the others pay."""
        short = [(seq, len(seq.token_ids)) for seq in rows.short()]
        short += [(s, end) for s, end in chunks if len(s.block_table) * s.block_size < end or s.shares_tail]
        if not short:
            return
        short.sort(key=lambda pair: pair[0].rank)
        if len(self._tenants.busy) > 1:
            names = {seq.tenant for seq, _ in short}
            held = {name: self._tables.held(name) / self._tenants[name].weight for name in names}
            short.sort(key=lambda pair: held[pair[0].tenant])
        for seq, end in short:
            while seq.status is Status.RUNNING and not self._tables.fit(seq, end):
                self.preempt(victim_for_growth(seq, self._tenants, self._tables.held))
        rows.refit()

    def finish_step(self, outcome: Outcome) -> list[Sequence]:
        """Take a step's outcome in, and tell each sequence's sink. Returns those that came to their end, which keep
        their blocks until they are withdrawn.

        Sequences that were withdrawn during the step, or whose rows failed, give their blocks back and are not told.
        """
        step = self._end_step()
        for row in outcome.failed_rows:
            step.seqs[row].withdrawn = True
        self._tenants.charge(step.tokens_by_tenant())
        finished: list[Sequence] = []
        seqs, tokens, told = step.rows.seqs, outcome.tokens, outcome.logprobs
        for seq, token, logprobs in zip(seqs, tokens, told or repeat(None), strict=False):
            if seq.withdrawn:
                self.withdraw(seq)
                continue
            seq.num_computed += 1
            seq.token_ids.append(token)
            reason = None
            if len(seq.token_ids) >= seq.due or token in seq.stop_ids:
                reason = self._mark(seq, token, finished)
            seq.sink(TokenEvent(seq, token, reason, logprobs))
        if step.rows is self._rows:
            self._rows.advance(tokens[: len(seqs)])
        else:
            self._rows = None
        drawn = islice(zip(tokens, told or repeat(None), strict=False), len(seqs), None)
        scores = iter(outcome.prompt_logprobs)
        for seq, end in step.chunks:
            scored = next(scores) if scores_of(seq, end) else ()
            choices = list(islice(drawn, draws_of(seq, end)))
            if seq.withdrawn:
                self.withdraw(seq)
            else:
                self._take_chunk(seq, end, choices, scored, finished)
        return finished

    def _mark(self, seq: Sequence, token: int, finished: list[Sequence]) -> str | None:
        """A sequence has got `token`, and has filled a block, or may have come to its end: why, if the answer has."""
        self._name_blocks(seq, seq.num_computed - 1)
        seq.set_due()
        reason = seq.finish_reason(token)
        if reason or len(seq.token_ids) >= seq.end_len:
            self._finish(seq)
            finished.append(seq)
        return reason

    def _name_blocks(self, seq: Sequence, before: int) -> None:
        """The blocks that were filled since `before` tokens were computed can be found from now on."""
        seq.extend_names()
        for index in range(before // seq.block_size, seq.blocks_computed):
            self._pool.name(seq.block_table[index], seq.names[index], seq.tenant)

    def _take_chunk(
        self,
        seq: Sequence,
        end: int,
        tokens: list[tuple[int, TokenLogprobs | None]],
        scored: Collection[TokenLogprobs],
        finished: list[Sequence],
    ) -> None:
        """A sequence has computed up to token `end`, and got one for each choice if that was the last known one."""
        before = seq.num_computed
        seq.advance(end - before)
        self._name_blocks(seq, before)
        seq.scored += len(scored)
        if not tokens:
            seq.sink(TokenEvent(seq, prompt_logprobs=scored))
            if seq.first_tokens and seq.num_computed == len(seq.token_ids):
                self._fork_known(seq)
            else:
                self._run(seq)
            return
        branches = self._fork(seq, range(len(tokens))) if len(tokens) > 1 else [seq]
        for branch, (token, logprobs) in zip(branches, tokens, strict=True):
            branch.token_ids.append(token)
            reason = self._mark(branch, token, finished)
            if branch.status is Status.RUNNING:
                self._run(branch)
            branch.sink(TokenEvent(branch, token, reason, logprobs, scored if branch is seq else ()))

    def _fork_known(self, seq: Sequence) -> None:
        """Its choices go on from first tokens that somebody else has chosen, and told."""
        known = seq.first_tokens
        branches = self._fork(seq, [choice - seq.params.choice for choice, _ in known])
        for branch, (_, token) in zip(branches, known, strict=True):
            branch.append(token)
            self._run(branch)

    def _fork(self, seq: Sequence, offsets: Iterable[int]) -> list[Sequence]:
        """Split a running sequence into choices, the first of which it is itself."""
        first, *others = offsets
        self._places += 1 + len(others) - seq.params.n  # fewer, where some have ended already
        branches = [seq.fork(offset) for offset in others]
        self._tables.share(seq, branches)
        seq.become(first)
        for branch in branches:
            self._sequences[branch.id] = self._tenants[seq.tenant].active[branch.id] = branch
        return [seq, *branches]

    def in_rows(self, rows: Collection[int]) -> list[Sequence]:
        """The sequences in these rows of the step in flight."""
        return [self._step.seqs[row] for row in rows] if self._step is not None else []

    def abandon_step(self) -> list[Sequence]:
        """The step failed: its sequences are finished. Those that were not withdrawn meanwhile."""
        failed = []
        for seq in self._end_step().seqs:
            self._finish(seq)
            if seq.withdrawn:
                self.withdraw(seq)
            else:
                failed.append(seq)
        return failed

    def _end_step(self) -> Step:
        step, self._step = self._step, None
        if step is None:
            raise AssertionError("no step is in flight")
        self._tables.copies_are_made()
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
        if self.in_flight(seq):
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
        if self._decoding.pop(seq.id, None) is not None:
            self._rows = None
        self._extending.pop(seq.id, None)
        del self._tenants[seq.tenant].active[seq.id]
        self._places -= seq.params.n

    def _drop_blocks(self, seq: Sequence) -> None:
        self._tables.close(seq)
        seq.filled = set()
        seq.num_computed = 0

    def check_integrity(self) -> None:
        """Raises AssertionError when block tables, states and counts disagree."""
        self._tables.check_integrity(self._sequences.values())
        active = self.of(Status.RESTORING, Status.RUNNING)
        if self._places != sum(seq.params.n for seq in active):
            raise AssertionError(f"{self._places} places are taken by {len(active)} active sequences")
        running = sorted([*self._decoding, *self._extending])
        if running != [seq.id for seq in active if seq.status is Status.RUNNING]:
            raise AssertionError("the running sequences are not those whose state says so")
        if self._rows is not None:
            self._rows.check_integrity()
            if self._rows.seqs != list(self._decoding.values()):
                raise AssertionError("the decoding rows are of other sequences")
        self._tenants.check_integrity(self._sequences.values())
        for seq in self._sequences.values():
            held = len(seq.block_table)
            problem = (
                (seq.status is Status.WAITING and held and "waits and holds blocks")
                or (held * seq.block_size < seq.num_computed and "has computed more than it holds")
                or (len(seq.names) < seq.reuse_cap and "has unnamed full blocks")
            )
            if problem:
                raise AssertionError(f"sequence {seq.id} ({seq.status.value}) {problem}")
