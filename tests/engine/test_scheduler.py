"""The scheduler over a pool whose memory is simulated: every position of KV is checked when a step reads it, so a block
shared, freed or written at the wrong moment shows, and every sequence gets the tokens that it would get alone."""

import random
from hashlib import blake2b

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvferry.common.block import BlockLayout
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.engine.page_pool import PagePool
from kvferry.engine.scheduler import Scheduler
from kvferry.engine.sequence import Sequence, Status

BLOCK = 4
VOCAB = 24
STOP = 0
LONGEST = 40
SCOPE = CacheScope(TenantKeys.from_chain_key(b"k" * 32), b"f", BlockLayout(1, 1, BLOCK, 1, "float32"))
# Few first tokens, so that prefixes are shared, and differ after one, two or three blocks.
PROMPTS = [[1] * 14, [1] * 5 + [2] * 9, [1] * 9 + [3] * 5, [4] * 14]


def kv_of(tokens: list[int]) -> bytes:
    """What a model would keep for the last of these tokens: it depends on all of them."""
    return blake2b(bytes(tokens), digest_size=8).digest()


def next_token(tokens: list[int]) -> int:
    return kv_of(tokens)[0] % VOCAB


def alone(prompt: list[int], params: SamplingParams, limit: int) -> list[int]:
    """The tokens that a sequence generates with nobody else there."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        count = len(tokens) - len(prompt)
        stopped = tokens[-1] == STOP and count > params.min_tokens
        if stopped or count >= min(params.max_tokens, limit) or len(tokens) >= LONGEST:
            return tokens[len(prompt) :]


class World:
    """A scheduler, its pool, the pool's memory, and everyone who asked. One step may be in flight."""

    def __init__(self, num_blocks: int, max_num_seqs: int, budget: int, max_waiting: int = 100):
        self.pool = PagePool(num_blocks)
        self.scheduler = Scheduler(self.pool, max_num_seqs, budget, max_waiting)
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.memory: dict[tuple[int, int], bytes] = {}
        self.live: dict[int, Sequence] = {}
        self.expected: dict[int, list[int]] = {}
        self.outcomes: dict[int, list[int]] = {}  # finished, by id
        self.uncollected: list[Sequence] = []
        self.plan = None
        self.last_id = 0

    def add(self, prompt: list[int], max_tokens: int, limit: int = 1000, min_tokens: int = 0) -> Sequence:
        self.last_id += 1
        params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens)
        seq = Sequence(
            self.last_id, "r", SCOPE, list(prompt), len(prompt), params, (STOP,), min(limit, max_tokens), LONGEST
        )
        self.scheduler.add(seq)
        self.live[seq.id] = seq
        self.expected[seq.id] = alone(prompt, params, limit)
        return seq

    def abort(self, seq: Sequence) -> None:
        self.live.pop(seq.id)
        self.scheduler.withdraw(seq)
        self.scheduler.withdraw(seq)  # may be repeated

    def restoring(self) -> list[Sequence]:
        return self.scheduler.of(Status.RESTORING)

    def restore(self, seq: Sequence, indices: list[int]) -> None:
        """These blocks arrive."""
        for index in indices:
            if seq.blocks_computed <= index < seq.reuse_cap and index not in seq.filled:
                block = seq.block_table[index]
                for position in range(index * BLOCK, (index + 1) * BLOCK):
                    self.memory[block, position % BLOCK] = kv_of(seq.token_ids[: position + 1])
                self.pool.name(block, seq.names[index])
                seq.fill(index)

    def learn_first_token(self, seq: Sequence) -> None:
        """Somebody else has computed the first token of a sequence that is being restored."""
        if len(seq.token_ids) == seq.prompt_len and len(self.expected[seq.id]) > 1:
            seq.append(next_token(seq.token_ids))

    def begin_step(self) -> bool:
        assert self.plan is None
        active = self.scheduler.of(Status.RESTORING, Status.RUNNING)
        self.plan = self.scheduler.schedule()
        if active and not self.uncollected:
            assert active[0].status is not Status.WAITING, "the oldest is pushed out"
        if self.plan is None:
            return False
        plan = self.plan
        assert 0 < plan.num_tokens <= self.budget
        assert len({row.seq_id for row in plan.rows}) == len(plan.rows) <= self.max_num_seqs
        self.written = {
            (row.block_table[p // BLOCK], p % BLOCK): self.kv_at(row, p)
            for row in plan.rows
            for p in range(row.start, row.start + len(row.token_ids))
        }
        assert len(self.written) == plan.num_tokens, "two rows write the same place"
        return True

    def kv_at(self, row, position: int) -> bytes:
        tokens = self.live[row.seq_id].token_ids
        assert tuple(tokens[row.start : row.start + len(row.token_ids)]) == row.token_ids
        return kv_of(tokens[: position + 1])

    def end_step(self) -> None:
        """The forward wrote, read and chose; the outcome is taken in."""
        plan, self.plan = self.plan, None
        self.memory.update(self.written)
        tokens = []
        for row in plan.rows:
            seq = self.scheduler._sequences[row.seq_id]
            end = row.start + len(row.token_ids)
            for position in range(end):
                place = (row.block_table[position // BLOCK], position % BLOCK)
                assert self.memory.get(place) == kv_of(seq.token_ids[: position + 1]), (
                    f"sequence {seq.id} reads another's KV at position {position}"
                )
            assert (row.draw is not None) == (end == len(seq.token_ids))
            tokens.append(None if row.draw is None else next_token(seq.token_ids))
        for seq, _, reason in self.scheduler.finish_step(plan, tokens):
            assert seq.id in self.live, "a sequence that was withdrawn is told of"
            if reason or seq.generated_here >= seq.limit:
                assert seq.id not in self.outcomes, "finished twice"
                self.outcomes[seq.id] = seq.token_ids[seq.prompt_len :]
                self.uncollected.append(seq)

    def collect(self) -> None:
        """The streams of finished sequences close."""
        for seq in self.uncollected:
            if seq.id in self.live:
                self.abort(seq)
        self.uncollected = []

    def check(self) -> None:
        self.scheduler.check_integrity()
        held = {block for seq in self.scheduler._sequences.values() for block in seq.block_table}
        assert self.pool.num_blocks - self.pool.num_free == len(held), "blocks are held that no table has"
        assert len(self.scheduler.of(Status.RESTORING, Status.RUNNING)) <= self.max_num_seqs

    def run_to_the_end(self) -> None:
        """Without new arrivals everyone finishes, with the tokens they would have alone, and nothing is held."""
        if self.plan is not None:
            self.end_step()
        for _ in range(50 * (len(self.live) + 1)):
            self.collect()
            self.scheduler.admit()
            for seq in self.restoring():
                self.scheduler.start(seq)
            if self.begin_step():
                self.end_step()
            self.check()
        self.collect()
        assert not self.live, f"never finished: {self.live}"
        assert not self.scheduler._sequences
        assert self.pool.num_free == self.pool.num_blocks
        for seq_id, tokens in self.outcomes.items():
            assert tokens == self.expected[seq_id]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(6, 12), seqs=st.integers(1, 4), spare=st.integers(0, 6))
    def start(self, blocks, seqs, spare):
        self.world = World(blocks, seqs, budget=seqs + spare)

    @rule(
        prompt=st.sampled_from(PROMPTS),
        length=st.integers(1, 14),
        max_tokens=st.integers(1, 9),
        min_tokens=st.integers(0, 3),
        limit=st.sampled_from([1, 1000]),
    )
    def arrive(self, prompt, length, max_tokens, min_tokens, limit):
        self.world.add(prompt[:length], max_tokens, limit, min_tokens)

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def abort(self, data):
        self.world.abort(self.world.live[data.draw(st.sampled_from(sorted(self.world.live)))])

    @rule()
    def admit(self):
        self.world.scheduler.admit()

    @precondition(lambda self: self.world.restoring())
    @rule(data=st.data(), indices=st.lists(st.integers(0, 3), max_size=4), told=st.booleans(), starts=st.booleans())
    def restore(self, data, indices, told, starts):
        seq = data.draw(st.sampled_from(self.world.restoring()))
        self.world.restore(seq, indices)
        if told:
            self.world.learn_first_token(seq)
        if starts:
            self.world.scheduler.start(seq)

    @precondition(lambda self: self.world.restoring())
    @rule()
    def start_all(self):
        for seq in self.world.restoring():
            self.world.scheduler.start(seq)

    @precondition(lambda self: self.world.plan is None)
    @rule()
    def begin_step(self):
        self.world.begin_step()

    @precondition(lambda self: self.world.plan is not None)
    @rule()
    def end_step(self):
        self.world.end_step()

    @precondition(lambda self: self.world.plan is None)
    @rule(steps=st.integers(1, 6))
    def several_steps(self, steps):
        for _ in range(steps):
            if self.world.begin_step():
                self.world.end_step()
                self.world.check()

    @precondition(lambda self: self.world.plan is not None)
    @rule()
    def the_step_fails(self):
        """Every stream of the step ends with an error."""
        rows, self.world.plan = self.world.plan, None
        self.world.scheduler.abandon_step(rows)
        for row in rows.rows:
            if row.seq_id in self.world.live:
                self.world.abort(self.world.live[row.seq_id])

    @rule()
    def collect(self):
        self.world.collect()

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.run_to_the_end()


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestScheduler = SchedulerMachine.TestCase


@pytest.mark.parametrize("seed", range(3))
def test_a_long_random_schedule(seed):
    """2,000 events over one pool, whose blocks are used and used again."""
    print(f"seed {seed}")
    dice = random.Random(seed)
    world = World(num_blocks=9 + seed, max_num_seqs=4, budget=4 + 4 * seed)
    aborted = 0
    for _ in range(2000):
        event = dice.random()
        if event < 0.15 and len(world.live) < 12:
            prompt = dice.choice(PROMPTS)[: dice.randint(1, 14)]
            world.add(prompt, dice.randint(1, 20), dice.choice([1, 1000, 1000]), dice.choice([0, 0, 5]))
        elif event < 0.18 and world.live:
            world.abort(world.live[dice.choice(sorted(world.live))])
            aborted += 1
        elif event < 0.4 and (restoring := world.restoring()):
            seq = dice.choice(restoring)
            world.restore(seq, dice.sample(range(6), 3))
            if dice.random() < 0.2:
                world.learn_first_token(seq)
            world.scheduler.start(seq)
        elif event < 0.5:
            world.collect()
        elif world.plan is None:
            world.scheduler.admit()
            world.begin_step()
        else:
            world.end_step()
        world.check()
    world.run_to_the_end()
    finished = len(world.outcomes)
    print(f"{finished} finished, {aborted} aborted, {world.scheduler.num_preemptions} preemptions")
    assert min(finished, aborted, world.scheduler.num_preemptions) > 5, "the schedule was too tame to tell anything"


@pytest.mark.parametrize(("budget", "length"), [(4, 14), (1, 3), (2, 9)])
def test_the_oldest_is_never_starved(budget, length):
    """Young sequences keep coming, most of which only ever need one token computed; the oldest always finishes soon."""
    dice = random.Random(budget)
    world = World(num_blocks=8, max_num_seqs=4, budget=budget)
    oldest, since = 0, 0
    for step in range(600):
        while len(world.live) < 8:
            world.add(dice.choice(PROMPTS)[: dice.choice([1] * 15 + [length])], dice.randint(1, 9))
        world.scheduler.admit()
        for seq in world.restoring():
            world.scheduler.start(seq)
        if world.begin_step():
            world.end_step()
        world.collect()
        world.check()
        if min(world.live) != oldest:
            oldest, since = min(world.live), step
        assert step - since < 60, f"sequence {oldest} waits"
    assert len(world.outcomes) > 50
    world.run_to_the_end()
