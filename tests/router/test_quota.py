"""A tenant's limits: exact counts on a clock that the test turns, and everything returned."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvferry.common.clock import ManualClock
from kvferry.common.errors import InvalidRequest, RateLimited
from kvferry.router.quota import Quota, Quotas, TenantLimits, blocks_for, duration_text


@pytest.fixture
def clock():
    return ManualClock(1000.0)


def quota_of(clock, **limits) -> Quota:
    return Quota(TenantLimits(**limits), clock)


def admitted(quota: Quota, tries: int) -> int:
    """How many of so many requests at the same moment are admitted; each ends at once."""
    count = 0
    for _ in range(tries):
        try:
            with quota.admit():
                count += 1
        except RateLimited:
            continue
    return count


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 8, 60, 600])
def test_requests_a_minute_are_counted_exactly(clock, limit):
    quota = quota_of(clock, requests_per_minute=limit)
    assert admitted(quota, limit + 5) == limit
    for _ in range(3):
        clock.advance(60 / limit - 0.001)
        assert admitted(quota, 3) == 0
        clock.advance(0.001)
        assert admitted(quota, 3) == 1
    clock.advance(60)
    assert admitted(quota, limit + 5) == limit
    clock.advance(3600)
    assert admitted(quota, limit + 5) == limit, "nobody saves up more than a minute"


def test_ten_tenths_are_one():
    """Each 0.1 s is off by a little in floating point; the count is not."""
    clock = ManualClock()
    quota = quota_of(clock, requests_per_minute=60)
    assert admitted(quota, 99) == 60
    for _ in range(10):
        clock.advance(0.1)
    assert admitted(quota, 9) == 1


@pytest.mark.parametrize("limit", [1, 7, 11, 60, 90, 600, 6000])
@pytest.mark.parametrize("later", [0.0, 0.005, 1e-9])
def test_after_the_seconds_it_names_it_is_admitted(clock, limit, later):
    quota = quota_of(clock, requests_per_minute=limit)
    assert admitted(quota, limit) == limit
    clock.advance(later)
    with pytest.raises(RateLimited) as refused:
        quota.admit()
    wait = refused.value.retry_after_s
    assert wait == math.ceil(round(60 / limit - later, 9))
    many = "1 request" if limit == 1 else f"{limit} requests"
    assert f"limit of {many} a minute is used up; try again in {wait} s" in str(refused.value)
    assert refused.value.limit == "requests_per_minute"
    clock.advance(wait)
    quota.admit().close()


def test_requests_at_once(clock):
    quota = quota_of(clock, concurrent_requests=2)
    first, second = quota.admit(), quota.admit()
    for _ in range(3):
        with pytest.raises(RateLimited, match=r"this tenant has 2 requests under way and its limit is 2") as refused:
            quota.admit()
        assert refused.value.retry_after_s == 1
    first.close()
    first.close()
    third = quota.admit()
    assert quota.concurrent_requests == 2
    second.close()
    third.close()
    assert quota.concurrent_requests == 0


def test_one_that_is_refused_does_not_count(clock):
    quota = quota_of(clock, concurrent_requests=1, requests_per_minute=2)
    with quota.admit():
        assert admitted(quota, 9) == 0
    assert admitted(quota, 9) == 1


def end_in(error: type[BaseException], quota: Quota) -> None:
    with quota.admit() as grant:
        grant.take_prompts([5], 10)
        raise error


def test_whatever_ends_a_request_gives_back_what_it_held(clock):
    quota = quota_of(clock, concurrent_requests=1, kv_blocks=10)
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error):
            end_in(error, quota)
    assert (quota.concurrent_requests, quota.kv_blocks) == (0, 0)


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_a_minute_count_the_prompt_then_what_is_generated(clock):
    quota = quota_of(clock, tokens_per_minute=600)  # ten a second
    with quota.admit() as grant:
        grant.take_prompts([100, 150], 0)
        assert quota.headers()["x-ratelimit-remaining-tokens"] == "350"
        for _ in range(50):
            grant.take_tokens(1)
        assert quota.headers()["x-ratelimit-remaining-tokens"] == "300"
    with quota.admit() as grant:
        with pytest.raises(RateLimited) as refused:
            grant.take_prompts([301], 0)
        assert str(refused.value) == (
            "the request has 301 prompt tokens, and this tenant has 300 left of its 600 tokens a minute; try again "
            "in 1 s"
        )
        assert refused.value.limit == "tokens_per_minute"
        grant.take_prompts([300], 0)
    assert quota.headers()["x-ratelimit-remaining-tokens"] == "0"


def test_what_runs_goes_into_debt_and_the_next_waits_for_it(clock):
    quota = quota_of(clock, tokens_per_minute=600)
    with quota.admit() as grant:
        grant.take_prompts([600], 0)
        grant.take_tokens(50)
    with quota.admit() as grant:
        with pytest.raises(RateLimited) as refused:
            grant.take_prompts([1], 0)
        assert refused.value.retry_after_s == 6  # 51 tokens, ten a second
        clock.advance(5.0999)
        with pytest.raises(RateLimited):
            grant.take_prompts([1], 0)
        clock.advance(0.0001)
        grant.take_prompts([1], 0)


# -- what could never be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "lengths", "blocks", "says"),
    [
        ({"prompt_tokens": 100}, [7, 101], 0, "the prompt has 101 tokens; this tenant's limit is 100 a prompt"),
        ({"tokens_per_minute": 100}, [60, 41], 0, "the request has 101 prompt tokens; this tenant's limit is 100 tok"),
        ({"kv_blocks": 100}, [1], 101, "the request may need 101 KV blocks for its prompt and max_tokens; this tenant"),
    ],
)
def test_one_above_a_limit_is_not_worth_a_second_try(clock, limits, lengths, blocks, says):
    quota = quota_of(clock, **limits)
    with quota.admit() as grant:
        with pytest.raises(InvalidRequest) as refused:
            grant.take_prompts(lengths, blocks)
        assert str(refused.value).startswith(says)
        grant.take_prompts([*lengths[:-1], lengths[-1] - 1], max(0, blocks - 1))


def test_blocks_in_flight(clock):
    quota = quota_of(clock, kv_blocks=10)
    first, second = quota.admit(), quota.admit()
    first.take_prompts([1], 6)
    with pytest.raises(RateLimited, match=r"may need 5 KV blocks .* and this tenant has 6 of its 10 in flight"):
        second.take_prompts([1], 5)
    second.take_prompts([1], 4)
    first.close()
    third = quota.admit()
    third.take_prompts([1], 6)
    assert quota.kv_blocks == 10
    second.close()
    third.close()
    assert quota.kv_blocks == 0


def test_what_is_refused_for_one_limit_counts_for_no_other(clock):
    quota = quota_of(clock, tokens_per_minute=100, kv_blocks=10)
    with quota.admit() as grant:
        for lengths, blocks in (([50], 11), ([101], 5)):
            with pytest.raises(InvalidRequest):
                grant.take_prompts(lengths, blocks)
        assert quota.kv_blocks == 0
        grant.take_prompts([100], 10)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "n", "blocks"),
    [(1, 1, 1, 1), (15, 1, 1, 1), (16, 1, 1, 2), (16, 16, 1, 2), (17, 15, 1, 2), (17, 16, 1, 3), (40, 8, 3, 5),
     (40, 9, 3, 8)],
)  # fmt: skip
def test_blocks_of_a_request(prompt, max_tokens, n, blocks):
    assert blocks_for(prompt, max_tokens, n, 16) == blocks


# -- headers ----------------------------------------------------------------------------------------------------------


def test_headers_are_those_of_openai(clock):
    quota = quota_of(clock, requests_per_minute=60, tokens_per_minute=600)
    with quota.admit() as grant:
        grant.take_prompts([400], 0)
        grant.take_tokens(5)
    assert quota.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "195",
        "x-ratelimit-reset-tokens": "40.5s",
    }
    assert quota_of(clock).headers() == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (1e-9, "1ms"), (0.12, "120ms"), (0.9999, "1s"), (7.5, "7.5s"), (59.999, "59.999s"), (60, "1m0s"),
     (366.25, "6m6.25s"), (3600, "1h0m0s"), (7325, "2h2m5s")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration_text(round(seconds * 10**9)) == text


# -- other limits in mid-flight ---------------------------------------------------------------------------------------


def test_a_bucket_stays_as_full_as_it_is(clock):
    quota = quota_of(clock, requests_per_minute=100)
    assert admitted(quota, 75) == 75
    quota.change(TenantLimits(requests_per_minute=20))
    assert admitted(quota, 99) == 5
    quota.change(TenantLimits())
    assert admitted(quota, 99) == 99
    quota.change(TenantLimits(requests_per_minute=3))
    assert admitted(quota, 99) == 3


def test_what_is_under_way_stays_when_the_limit_falls_below_it(clock):
    quota = quota_of(clock, concurrent_requests=3, kv_blocks=30)
    grants = [quota.admit() for _ in range(3)]
    for grant in grants:
        grant.take_prompts([1], 10)
    quota.change(TenantLimits(concurrent_requests=1, kv_blocks=5))
    for grant in grants:
        with pytest.raises(RateLimited):
            quota.admit()
        grant.close()
        quota.check_integrity()
    quota.admit().close()


def test_each_tenant_has_its_own_and_keeps_it_when_limits_change(clock):
    one, ten = TenantLimits(requests_per_minute=1), TenantLimits(requests_per_minute=10)
    quotas = Quotas(clock)
    acme = quotas.of("acme", one)
    assert admitted(acme, 5) == 1
    assert admitted(quotas.of("bolt", one), 5) == 1
    assert quotas.of("acme", ten) is acme, "the limits there are now are told by `update`"
    quotas.update({"acme": ten})
    assert quotas.of("acme", one) is acme
    assert acme.limits == ten
    assert admitted(quotas.of("bolt", one), 5) == 1, "one that had gone begins anew"


# -- any order of anything --------------------------------------------------------------------------------------------

small = st.integers(1, 6)
some_limits = st.builds(
    TenantLimits,
    concurrent_requests=st.none() | small,
    requests_per_minute=st.none() | st.integers(1, 120),
    tokens_per_minute=st.none() | st.integers(1, 500),
    prompt_tokens=st.none() | st.integers(1, 100),
    kv_blocks=st.none() | st.integers(1, 20),
)


class QuotaMachine(RuleBasedStateMachine):
    """Against a plain account of what was admitted and when."""

    grants = Bundle("grants")

    def __init__(self):
        super().__init__()
        self.clock = ManualClock()
        self.limits = TenantLimits(concurrent_requests=3, requests_per_minute=60, tokens_per_minute=200, kv_blocks=10)
        self.quota = Quota(self.limits, self.clock)
        self.open: dict[int, int] = {}  # blocks by grant
        self.since, self.requests, self.tokens = 0.0, 0, 0  # admitted since the limits last changed
        self.had = (60, 200)  # left in the buckets then

    @rule(seconds=st.sampled_from([0.001, 0.25, 1, 7, 61]))
    def wait(self, seconds):
        self.clock.advance(seconds)

    @rule(target=grants)
    def ask(self):
        fits = self.limits.concurrent_requests is None or len(self.open) < self.limits.concurrent_requests
        try:
            grant = self.quota.admit()
        except RateLimited:
            assert not fits or self.quota.headers()["x-ratelimit-remaining-requests"] == "0"
            return None
        assert fits
        self.open[id(grant)] = 0
        self.requests += 1
        return grant

    @rule(grant=grants, length=st.integers(1, 120), blocks=st.integers(1, 12))
    def take_prompt(self, grant, length, blocks):
        if grant is None or self.open.get(id(grant), 1):
            return
        try:
            grant.take_prompts([length], blocks)
        except (RateLimited, InvalidRequest):
            assert grant.kv_blocks == 0
            return
        self.open[id(grant)] = blocks
        self.tokens += length
        assert self.limits.prompt_tokens is None or length <= self.limits.prompt_tokens
        assert self.limits.kv_blocks is None or sum(self.open.values()) <= self.limits.kv_blocks
        if (limit := self.limits.tokens_per_minute) is not None:
            assert self.tokens <= self.had[1] + limit * (self.clock.now() - self.since) / 60 + 1

    @rule(grant=grants, count=st.integers(1, 60))
    def generate(self, grant, count):
        if grant is not None and self.open.get(id(grant)):
            grant.take_tokens(count)
            self.tokens += count

    @rule(grant=consumes(grants))
    def end(self, grant):
        if grant is not None:
            grant.close()
            grant.close()
            del self.open[id(grant)]

    @rule(limits=some_limits)
    def other_limits(self, limits):
        self.quota.change(limits)
        self.limits = limits
        self.since, self.requests, self.tokens = self.clock.now(), 0, 0
        buckets = (self.quota._requests, self.quota._tokens)
        self.had = tuple(bucket.left if bucket else math.inf for bucket in buckets)

    @invariant()
    def never_more_than_allowed(self):
        self.quota.check_integrity()
        assert self.quota.concurrent_requests == len(self.open)
        assert self.quota.kv_blocks == sum(self.open.values())
        if (limit := self.limits.requests_per_minute) is not None:
            assert self.requests <= self.had[0] + limit * (self.clock.now() - self.since) / 60 + 1

    def teardown(self):
        for grant in list(self.quota._grants):
            grant.close()
        assert (self.quota.concurrent_requests, self.quota.kv_blocks) == (0, 0)
        self.quota.change(TenantLimits(requests_per_minute=5))
        self.clock.advance(60)
        assert admitted(self.quota, 9) == 5


QuotaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_quota_machine = QuotaMachine.TestCase
