"""Tenants share an engine by weight, whoever came first and however much one of them asks. Time is counted in steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.block import BlockLayout
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Outcome
from kvferry.engine.page_pool import PagePool
from kvferry.engine.scheduling.fairness import Tenant, Tenants
from kvferry.engine.scheduling.preemption import victim_for_growth, victims_for_admission
from kvferry.engine.scheduling.scheduler import Scheduler
from kvferry.engine.sequence import Sequence, Status

BLOCK = 16
HEAVY, LIGHT, THIRD = (
    CacheScope(TenantKeys.of(letter * 32), b"f", BlockLayout(1, 1, BLOCK, 1, "float32"))
    for letter in (b"h", b"l", b"t")
)
PROMPT, ANSWER = 96, 64
BLOCKS_EACH = (PROMPT + ANSWER) // BLOCK


class Place:
    """A scheduler that runs; nothing is ever found in the pool, since every prompt differs."""

    def __init__(self, blocks, seqs, budget):
        self.scheduler = Scheduler(PagePool(blocks), seqs, budget, max_waiting=1000)
        self.last_id = self.steps = 0
        self.served = {HEAVY: 0, LIGHT: 0, THIRD: 0}

    def ask(self, scope, prompt_len=PROMPT, answer=ANSWER, **more):
        self.last_id += 1
        prompt = [self.last_id] * prompt_len
        params = SamplingParams(max_tokens=answer)
        seq = Sequence(self.last_id, "r", scope, prompt, prompt_len, params, (), answer, 10_000, **more)
        self.scheduler.add(seq)
        return seq

    def step(self):
        for seq in self.scheduler.admit():
            self.scheduler.start(seq)
        plan = self.scheduler.schedule()
        self.steps += 1
        if plan is not None:
            scopes = {seq.id: seq.scope for seq in self.scheduler._sequences.values()}
            for seq_id, length in zip(plan.seq_ids, plan.lengths.tolist(), strict=True):
                self.served[scopes[seq_id]] += length
            for seq in self.scheduler.finish_step(Outcome([1] * len(plan.draws))):
                self.scheduler.withdraw(seq)
        self.scheduler.check_integrity()

    def until_done(self, seq):
        """How many steps it takes from here on."""
        begun = self.steps
        while seq.status is not Status.FINISHED:
            self.step()
            assert self.steps - begun < 10_000, "it never ends"
        return self.steps - begun


@pytest.mark.parametrize("others_first", [0, 1, 40])
@pytest.mark.parametrize(
    ("blocks", "seqs", "budget"),
    [
        (200 * BLOCKS_EACH, 64, 256),  # places run short
        (200 * BLOCKS_EACH, 16, 64),  # and the token budget
        (8 * BLOCKS_EACH, 64, 256),  # the pool holds 8 of them
        (3 * BLOCKS_EACH, 64, 64),
    ],
)
def test_one_request_beside_a_hundred(blocks, seqs, budget, others_first):
    """It takes at most half as long again as alone, whether it comes with them or when they have filled the engine."""
    alone = Place(blocks, seqs, budget)
    time_alone = alone.until_done(alone.ask(LIGHT))
    place = Place(blocks, seqs, budget)
    crowd = [place.ask(HEAVY) for _ in range(100)]
    for _ in range(others_first):
        place.step()
    assert place.until_done(place.ask(LIGHT)) <= 1.5 * time_alone
    for seq in crowd:
        place.until_done(seq)
    assert all(len(seq.token_ids) == PROMPT + ANSWER for seq in crowd), "a token was lost or repeated"


def test_with_one_place_it_comes_next():
    """Nobody is pushed out for it where its tenant would then hold more than the other."""
    alone = Place(200, 1, 64)
    time_alone = alone.until_done(alone.ask(LIGHT))
    place = Place(200, 1, 64)
    for _ in range(100):
        place.ask(HEAVY)
    place.step()
    assert place.until_done(place.ask(LIGHT)) <= 2 * time_alone
    assert place.scheduler.num_preemptions == 0


def test_many_small_requests_do_not_starve_a_large_one():
    place = Place(blocks=60, seqs=16, budget=64)
    large = place.ask(LIGHT, prompt_len=400, answer=40)
    alone = Place(60, 16, 64)
    time_alone = alone.until_done(alone.ask(LIGHT, prompt_len=400, answer=40))
    while large.status is not Status.FINISHED:
        while len(place.scheduler.of(Status.WAITING)) < 20:
            place.ask(HEAVY, prompt_len=3, answer=5)
        place.step()
        assert place.steps <= 1.5 * time_alone + 2


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize(("blocks", "seqs"), [(2000, 8), (40, 32)])
def test_tokens_are_served_by_weight(weight, blocks, seqs):
    place = Place(blocks, seqs, budget=64)
    for _ in range(800):
        for scope in (HEAVY, LIGHT):
            while sum(seq.scope is scope for seq in place.scheduler.of(Status.WAITING)) < 5:
                place.ask(scope, weight=weight if scope is HEAVY else 1.0)
        place.step()
    assert place.served[HEAVY] / place.served[LIGHT] == pytest.approx(weight, rel=0.15)


def test_nobody_saves_up():
    """Who was idle while another worked gets its half from then on, not what it missed."""
    place = Place(blocks=2000, seqs=8, budget=64)
    for _ in range(300):
        place.ask(HEAVY)
    for _ in range(300):
        place.step()
    place.served = dict.fromkeys(place.served, 0)
    for _ in range(100):
        place.ask(LIGHT)
    for _ in range(200):
        place.step()
    assert place.served[HEAVY] / place.served[LIGHT] == pytest.approx(1, rel=0.2)


def test_nobody_saves_up_by_being_never_quite_idle():
    """One slow stream all along is no credit for a burst; nor for one who comes then."""
    place = Place(blocks=20_000, seqs=8, budget=128)
    place.ask(LIGHT, prompt_len=10, answer=5_000)
    for step in range(2000):
        while len(place.scheduler.of(Status.WAITING)) < 8:
            place.ask(HEAVY, answer=32)
        if step == 1000:
            place.served = dict.fromkeys(place.served, 0)
        if step >= 1000:
            while sum(seq.scope is LIGHT for seq in place.scheduler.of(Status.WAITING)) < 4:
                place.ask(LIGHT, answer=32)
            while sum(seq.scope is HEAVY for seq in place.scheduler.of(Status.WAITING)) < 4:
                place.ask(HEAVY, answer=32)
        place.step()
    assert place.served[HEAVY] / place.served[LIGHT] == pytest.approx(1, rel=0.15)


def test_what_is_admitted_at_once_is_shared_too():
    """Nothing has been computed for anybody yet when a burst of both is let in."""
    place = Place(blocks=2000, seqs=8, budget=64)
    for scope in (HEAVY, LIGHT):
        for _ in range(20):
            place.ask(scope)
    admitted = place.scheduler.admit()
    assert [sum(seq.scope is scope for seq in admitted) for scope in (HEAVY, LIGHT)] == [4, 4]


def test_one_that_does_not_fit_stops_nobody_who_does():
    """The large one's turn it is; a small one of a third tenant passes. In the end the large one gets in as well."""
    place = Place(blocks=200, seqs=64, budget=256)
    for _ in range(10):
        place.ask(HEAVY, prompt_len=128, answer=100)
    place.step()
    large = place.ask(LIGHT, prompt_len=180 * BLOCK, answer=10)
    small = place.ask(THIRD, prompt_len=4, answer=4)
    assert place.until_done(small) <= 8
    assert large.status is Status.WAITING
    while large.status is not Status.FINISHED:
        while sum(seq.scope is THIRD for seq in place.scheduler.of(Status.WAITING)) < 4:
            place.ask(THIRD, prompt_len=40, answer=40)
        place.step()
        assert place.steps < 2000, "those who pass never end"


def test_streams_of_one_tenant_take_turns():
    """Its share of a step is less than the streams it has: all of them get on, and its urgent prompt before them."""
    place = Place(blocks=4000, seqs=64, budget=64)
    streams = [place.ask(HEAVY, prompt_len=1, answer=2_000) for _ in range(40)]
    for _ in range(3):
        place.step()
    for _ in range(6):
        place.ask(LIGHT, prompt_len=9_000, answer=2)
    urgent = place.ask(HEAVY, prompt_len=200, answer=2, priority=-1)
    assert place.until_done(urgent) < 100
    before = [len(seq.token_ids) for seq in streams]
    for _ in range(100):
        place.step()
    gained = [len(seq.token_ids) - had for seq, had in zip(streams, before, strict=True)]
    assert max(gained) - min(gained) <= 2
    assert sum(gained) == pytest.approx(100 * 32, rel=0.1)


def held(place, scope, blocks, weight, sharing=()):
    """A sequence that runs and holds so many blocks of its own, after `sharing`, which others hold too."""
    seq = place.ask(scope, weight=weight)
    scheduler = place.scheduler
    tenant = scheduler._tenants[seq.tenant]
    tenant.waiting.remove(seq)
    tenant.active[seq.id] = seq
    scheduler._pool.hold(sharing)
    seq.status, seq.block_table = Status.RUNNING, [*sharing, *scheduler._pool.allocate(blocks)]
    scheduler._tables._enter(seq)
    return seq


def test_who_grows_takes_from_who_holds_most_for_its_weight():
    place = Place(blocks=2000, seqs=64, budget=64)
    rich = [held(place, HEAVY, 10, 3.0) for _ in range(2)]
    poor = [held(place, LIGHT, 8, 1.0)]
    tenants, blocks = place.scheduler._tenants, place.scheduler._tables.held
    assert victim_for_growth(rich[0], tenants, blocks) is poor[0], "20 for a weight of 3 are less than 8 for 1"
    sharing = held(place, HEAVY, 3, 3.0, sharing=rich[0].block_table)
    assert victim_for_growth(rich[0], tenants, blocks) is poor[0], "23 are less, too: what is shared counts once"
    last = held(place, HEAVY, 2, 3.0)
    assert victim_for_growth(poor[0], tenants, blocks) is last, "25 are more"
    assert blocks(sharing.tenant, [sharing]) == 22
    assert blocks(sharing.tenant, [sharing, rich[0]]) == 12
    place.scheduler._tables.close(rich[0])
    assert victim_for_growth(poor[0], tenants, blocks) is last, "somebody still holds what the first one had first"


def test_a_tenant_that_only_waits_has_nothing_to_give():
    place = Place(blocks=40, seqs=64, budget=64)
    place.ask(LIGHT)
    growing = held(place, HEAVY, 0, 1.0)
    assert victim_for_growth(growing, place.scheduler._tenants, place.scheduler._tables.held) is growing


@pytest.mark.parametrize(("weight", "lets_in"), [(1.0, False), (3.0, True)])
def test_who_is_let_in_ends_with_no_more_than_who_made_room(weight, lets_in):
    place = Place(blocks=2000, seqs=64, budget=64)
    holders = [held(place, LIGHT, 4, 1.0) for _ in range(4)]
    for _ in range(4):
        held(place, HEAVY, 4, weight)
    newcomer = place.ask(HEAVY, prompt_len=3 * BLOCK, weight=weight)
    for places, blocks in ((1, 0), (0, 4)):
        victims = victims_for_admission(
            newcomer,
            place.scheduler._tenants,
            places,
            blocks,
            lambda seq: len(seq.block_table),
            lambda seq: False,
            place.scheduler._tables.held,
        )
        assert victims == ([holders[-1]] if lets_in else None)


def test_priority_is_among_ones_own():
    """The most urgent of a tenant's goes first; another tenant's turn does not depend on it."""
    place = Place(blocks=2000, seqs=1, budget=64)
    running = place.ask(HEAVY)
    place.step()
    later, urgent = place.ask(HEAVY, priority=5), place.ask(HEAVY, priority=-5)
    other = place.ask(LIGHT, priority=1000)
    ended = []
    while len(ended) < 4:
        place.step()
        ended += [s for s in (running, later, urgent, other) if s.status is Status.FINISHED and s not in ended]
    assert ended.index(urgent) < ended.index(later)
    assert ended.index(other) < ended.index(later)


def test_two_tenants_never_push_each_other_out_in_turn():
    """Each has more than fits; who is in stays in until something has changed."""
    place = Place(blocks=40, seqs=32, budget=64)
    for _ in range(10):
        for scope in (HEAVY, LIGHT):
            place.ask(scope, prompt_len=120, answer=8)
    while any(seq.status is not Status.FINISHED for seq in place.scheduler.of(Status.WAITING, Status.RUNNING)):
        place.step()
        assert place.steps < 500
    assert place.scheduler.num_preemptions <= 20


NAMES = ("a", "b", "c", "d")


@given(
    budget=st.integers(1, 300),
    wanted=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 200), min_size=1),
    weights=st.lists(st.sampled_from([0.5, 1.0, 1.0, 3.0]), min_size=4, max_size=4),
    served=st.lists(st.integers(0, 50), min_size=4, max_size=4),
)
def test_a_step_is_split_to_the_last_token(budget, wanted, weights, served):
    tenants = Tenants()
    for name, weight, before in zip(NAMES, weights, served, strict=True):
        tenants._tenants[name] = tenant = Tenant(name, float(before))
        tenant.weight = weight
    given_out = tenants.split(budget, wanted)
    assert sum(given_out.values()) == min(budget, sum(wanted.values()))
    assert all(0 <= given_out[name] <= wanted[name] for name in wanted)
    for poor in wanted:
        if given_out[poor] < wanted[poor]:  # then nobody has got much more for its weight
            fair = given_out[poor] / tenants[poor].weight
            for rich in wanted:
                assert given_out[rich] / tenants[rich].weight <= fair + 2 / min(weights) + 1
