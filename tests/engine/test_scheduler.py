"""Any mix of arrivals, forks, restores, steps, preemptions, failures and aborts, over pools of any size."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling import BLOCK, PROMPTS, TENANTS, World

from kvferry.engine.sequence import Status


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(6, 14), seqs=st.integers(1, 5), spare=st.integers(0, 6))
    def start(self, blocks, seqs, spare):
        self.world = World(blocks, seqs, budget=seqs + spare)

    @rule(
        prompt=st.sampled_from(PROMPTS),
        length=st.integers(1, 14),
        max_tokens=st.integers(1, 9),
        min_tokens=st.integers(0, 3),
        limit=st.sampled_from([1, 1000, 1000]),
        n=st.integers(1, 3),
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from([0, 0, 1, -1]),
        weight=st.sampled_from([1.0, 1.0, 2.5]),
    )
    def arrive(self, prompt, length, max_tokens, min_tokens, limit, n, tenant, priority, weight):
        n = min(n, self.world.max_num_seqs)
        self.world.add(
            prompt[:length], max_tokens, limit, min_tokens, n=n, tenant=tenant, priority=priority, weight=weight
        )

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
            self.world.learn_first_tokens(seq)
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
        self.world.plan = None
        for seq in self.world.scheduler.abandon_step():
            self.world.abort(self.world.live[seq.id])

    @precondition(lambda self: self.world.movable())
    @rule(data=st.data())
    def preempt(self, data):
        self.world.scheduler.preempt(data.draw(st.sampled_from(self.world.movable())))

    @rule()
    def collect(self):
        self.world.collect()

    @precondition(lambda self: self.world.active())
    @rule(data=st.data())
    def publish(self, data):
        self.world.publish(data.draw(st.sampled_from(self.world.active())))

    @precondition(lambda self: self.world.publishing)
    @rule(data=st.data())
    def published(self, data):
        self.world.published(data.draw(st.integers(0, len(self.world.publishing) - 1)))

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.run_to_the_end()


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestScheduler = SchedulerMachine.TestCase


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_a_long_random_schedule(seed):
    """10,000 steps over one pool, whose blocks are used and used again: everyone ends exactly once, with the tokens
    that they get alone."""
    print(f"seed {seed}")
    dice = random.Random(seed)
    world = World(num_blocks=9 + 2 * seed, max_num_seqs=4 + seed, budget=4 + 5 * seed)
    aborted = 0
    while world.steps < 10_000:
        event = dice.random()
        if event < 0.15 and len(world.live) < 12:
            prompt = dice.choice(PROMPTS)[: dice.randint(1, 14)]
            world.add(
                prompt, dice.randint(1, 20), dice.choice([1, 1000, 1000]), dice.choice([0, 0, 5]),
                n=dice.choice([1, 1, 2, 4]), tenant=dice.choice("aaab"), priority=dice.choice([0, 0, 0, 1]),
            )  # fmt: skip
        elif event < 0.18 and world.live:
            world.abort(world.live[dice.choice(sorted(world.live))])
            aborted += 1
        elif event < 0.4 and (restoring := world.restoring()):
            seq = dice.choice(restoring)
            world.restore(seq, dice.sample(range(6), 3))
            if dice.random() < 0.2:
                world.learn_first_tokens(seq)
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
    finished, preempted = sum(world.ended.values()), world.scheduler.num_preemptions
    seen = {"finished": finished, "aborted": aborted, "preempted": preempted, "forked": world.forks}
    print(seen | {"copied": world.copies})
    assert min(*seen.values(), world.copies) > 20, "too tame to tell anything"


@pytest.mark.parametrize(("budget", "length"), [(4, 14), (1, 3), (2, 9)])
def test_the_oldest_is_never_starved(budget, length):
    """Young sequences keep coming, most of which only ever need one token computed; the oldest always finishes soon."""
    dice = random.Random(budget)
    world = World(num_blocks=8, max_num_seqs=4, budget=budget)
    oldest, since = 0, 0
    for step in range(600):
        while len(world.live) < 8:
            world.add(dice.choice(PROMPTS)[: dice.choice([1] * 15 + [length])], dice.randint(1, 9))
        world.turn()
        world.collect()
        world.check()
        if min(world.live) != oldest:
            oldest, since = min(world.live), step
        assert step - since < 60, f"sequence {oldest} waits"
    assert sum(world.ended.values()) > 50
    world.run_to_the_end()


def test_a_full_pool_that_nobody_can_give_from():
    """All but one sequence's blocks are being published for those who had them before; the tenant that is first in
    line only waits, and the one that grows is the one that makes room."""
    world = World(14, 8, 64)
    first = world.add([4] * BLOCK, 12, min_tokens=12, tenant="b")
    world.turn()
    world.publish(first)
    root = world.add([1] * (BLOCK * 7 - 1), 12, min_tokens=12, n=2, tenant="a")
    world.turn()
    world.abort(root)  # of two choices the first
    world.abort(first)
    kept = world.pool.allocate(world.pool.num_free)
    world.add([3] * (BLOCK * 5), 3, tenant="b")
    for _ in range(8):
        world.turn()
    world.pool.release(kept)
    world.run_to_the_end()


def test_what_a_tenant_holds_is_counted_whoever_had_it_first():
    """So it can be pushed out for another: two answers to one prompt are no less than one when the first has ended."""
    for n in (1, 2):
        world = World(19, 8, 64)
        for token in (1, 4):
            root = world.add([token] * 27, 12, min_tokens=12, n=n, tenant="a")
            world.turn()
            if n == 2:
                world.abort(root)
        newcomer = world.add([3] * 23, 3, tenant="b")
        world.scheduler.admit()
        assert newcomer.status is Status.RESTORING
        assert world.scheduler.num_preemptions == 1
        world.run_to_the_end()
