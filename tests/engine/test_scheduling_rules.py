"""Who is refused, who waits, who goes first, who is pushed out: one small case each."""

import pytest

from kvferry.common.block import BlockLayout
from kvferry.common.errors import InvalidRequest, Overloaded
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Outcome
from kvferry.engine.page_pool import PagePool
from kvferry.engine.scheduling.scheduler import Scheduler
from kvferry.engine.sequence import Sequence, Status

LONGEST = 40
SCOPE = CacheScope(TenantKeys.of(b"k" * 32), b"f", BlockLayout(1, 1, 4, 1, "float32"))


def sequence(prompt_len, max_tokens, *, generated=0, limit=None, longest=LONGEST, number=1, scope=SCOPE, **more):
    params = SamplingParams(max_tokens=max_tokens, n=more.pop("n", 1))
    limit = max_tokens if limit is None else limit
    tokens = [1] * (prompt_len + generated)
    return Sequence(number, "r", scope, tokens, prompt_len, params, (), limit, longest, **more)


def finish(scheduler, plan):
    """Every draw chooses token 2."""
    return scheduler.finish_step(Outcome([2] * len(plan.draws)))


@pytest.mark.parametrize(
    ("seq", "fits"),
    [
        (sequence(10, 6), True),
        (sequence(10, 7), False),
        (sequence(15, 1), True),
        (sequence(16, 1), False),
        (sequence(15, 100, limit=1), True),  # a fill gives one token, whatever the request asks
        (sequence(16, 100, limit=1), False),
        (sequence(6, 10, generated=9), True),  # carried on from another node: nine of the ten are there already
        (sequence(6, 100, longest=16), True),  # the model ends it at 16
        (sequence(6, 100, longest=17), False),
    ],
)
def test_what_can_never_fit_is_refused_and_all_else_runs(seq, fits):
    pool = PagePool(4)  # 16 tokens
    scheduler = Scheduler(pool, 4, 16, 4)
    if not fits:
        with pytest.raises(InvalidRequest, match="16"):
            scheduler.add(seq)
        return
    scheduler.add(seq)
    for _ in range(30):
        for admitted in scheduler.admit():
            scheduler.start(admitted)
        if (plan := scheduler.schedule()) is not None:
            finish(scheduler, plan)
        scheduler.check_integrity()
    assert seq.status is Status.FINISHED
    assert scheduler.num_preemptions == 0
    assert len(seq.token_ids) == min(seq.max_model_len, seq.prompt_len + min(seq.limit, seq.params.max_tokens))


def test_a_full_queue_refuses():
    scheduler = Scheduler(PagePool(4), max_num_seqs=1, max_num_batched_tokens=8, max_waiting=2)
    first, *rest = [sequence(3, 2, number=i) for i in range(1, 5)]
    scheduler.add(first)
    scheduler.admit()
    for seq in rest[:2]:
        scheduler.add(seq)
    with pytest.raises(Overloaded, match="2 requests"):
        scheduler.add(rest[2])
    assert rest[2] not in scheduler
    scheduler.withdraw(first)
    scheduler.admit()
    scheduler.add(rest[2])


def test_who_is_half_restored_goes_first_and_the_oldest_last():
    """Three of two blocks each, no room left: the first to need more pushes out the one that is being restored."""
    scheduler = Scheduler(pool := PagePool(8), 4, 16, 4)
    old, middle, young = (sequence(6, 20, number=i, longest=21) for i in (1, 2, 3))
    for seq in (old, middle, young):
        scheduler.add(seq)
    old_and_young = [seq for seq in scheduler.admit() if seq is not middle]
    assert pool.num_free == 2
    for seq in old_and_young:
        scheduler.start(seq)
    while not scheduler.num_preemptions:
        plan = scheduler.schedule()
        finish(scheduler, plan)
    assert [seq.status for seq in (old, middle, young)] == [Status.RUNNING, Status.WAITING, Status.RUNNING]
    while scheduler.num_preemptions == 1:
        plan = scheduler.schedule()
        finish(scheduler, plan)
    assert [seq.status for seq in (old, middle, young)] == [Status.RUNNING, Status.WAITING, Status.WAITING]


def test_the_young_never_push_out_the_old():
    """Not even one that is only being restored: who needs a block, and finds nobody younger, waits itself."""
    scheduler = Scheduler(pool := PagePool(5), 4, 16, 4)
    old, young = (sequence(6, 14, number=i) for i in (1, 2))
    for seq in (old, young):
        scheduler.add(seq)
    assert scheduler.admit() == [old, young]
    scheduler.start(young)
    while (plan := scheduler.schedule()) is not None:
        finish(scheduler, plan)
    assert [seq.status for seq in (old, young)] == [Status.RESTORING, Status.WAITING]
    assert (len(young.token_ids), pool.num_free) == (13, 3)


def test_a_long_prompt_delays_nobodys_next_token():
    scheduler = Scheduler(PagePool(20), 4, 4, 4)
    long, short = sequence(14, 2, number=1), sequence(1, 20, number=2)
    for seq in (short, long):
        scheduler.add(seq)
        for admitted in scheduler.admit():
            scheduler.start(admitted)
    while long.num_computed < 14:
        plan = scheduler.schedule()
        assert dict(zip(plan.seq_ids, plan.lengths, strict=True))[short.id] == 1
        assert plan.num_tokens == min(4, 1 + 14 - long.num_computed), "the rest of the budget is the prompt's"
        finish(scheduler, plan)
