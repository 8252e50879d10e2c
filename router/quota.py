"""What a tenant may use at once and by the minute, and what it uses now.

By the minute counts a token bucket: it holds a minute's worth, begins full and is refilled all the time, so who has
paused may spend a minute's worth at once and then goes on at the limit's pace: in any t seconds at most
`limit * (1 + t / 60)`. Every request with a valid key counts, also one that is refused later for another reason.

Tokens: a request's prompt counts when it is admitted, whether cached or not, each prompt of a batch once; generated
tokens count as they come, and may leave the bucket in debt: what runs is never cut short, but nothing new is admitted
until the debt is paid. KV blocks are reserved at admission, for the prompt and `max_tokens` of every choice, and given
back at the end, so there are never more in flight than allowed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from kvferry.common.clock import Clock
from kvferry.common.errors import InvalidRequest, KvferryError, RateLimited
from kvferry.common.hashing import TenantId
from kvferry.common.values import counted

SECOND_NS = 10**9
MINUTE_NS = 60 * SECOND_NS
SOON_S = 1  # where the wait is for other requests of the tenant to end, nobody knows how long it is


@dataclass(frozen=True, kw_only=True)
class TenantLimits:
    """None is no limit. `weight`: the tenant's share, among the others, of the workers' steps, places and blocks."""

    concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    prompt_tokens: int | None = None
    kv_blocks: int | None = None
    weight: float = 1.0


UNLIMITED = TenantLimits()


class Bucket:
    """A token bucket in integers, so its counts are exact: a level of MINUTE_NS is one thing left, and each nanosecond
    adds `per_minute`. The level is below zero after a debt."""

    def __init__(self, per_minute: int, clock: Clock):
        self.per_minute = per_minute
        self._clock = clock
        self._level = self._full
        self._seen = self._now()

    @property
    def left(self) -> int:
        """How many there are now; never below zero."""
        return max(0, self._refilled() // MINUTE_NS)

    def take(self, count: int) -> None:
        self._level = self._refilled() - count * MINUTE_NS

    def wait_ns(self, count: int) -> int:
        """How long until there are `count`, at most `per_minute`; 0 if there are."""
        return max(0, -((self._refilled() - count * MINUTE_NS) // self.per_minute))

    def change(self, per_minute: int) -> None:
        """Another limit from now on. It stays as full, or as deep in debt, as it is."""
        self._level = self._refilled() * per_minute // self.per_minute
        self.per_minute = per_minute

    def check_integrity(self) -> None:
        if self._level > self._full:
            raise AssertionError(f"a bucket of {self.per_minute} a minute holds more than that")

    @property
    def _full(self) -> int:
        return self.per_minute * MINUTE_NS

    def _now(self) -> int:
        return round(self._clock.now() * SECOND_NS)

    def _refilled(self) -> int:
        now = self._now()
        self._level = min(self._full, self._level + max(0, now - self._seen) * self.per_minute)
        self._seen = now
        return self._level


class Quota:
    """One tenant's use. Nothing in it waits."""

    def __init__(self, limits: TenantLimits, clock: Clock):
        self._clock = clock
        self.limits = UNLIMITED
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._grants: set[Grant] = set()
        self.kv_blocks = 0  # reserved by the requests under way
        self.change(limits)

    @property
    def concurrent_requests(self) -> int:
        return len(self._grants)

    def change(self, limits: TenantLimits) -> None:
        """Other limits from now on; what is under way stays."""
        self.limits = limits
        self._requests = self._changed(self._requests, limits.requests_per_minute)
        self._tokens = self._changed(self._tokens, limits.tokens_per_minute)

    def _changed(self, bucket: Bucket | None, per_minute: int | None) -> Bucket | None:
        if bucket is None or per_minute is None:
            return None if per_minute is None else Bucket(per_minute, self._clock)
        bucket.change(per_minute)
        return bucket

    def admit(self) -> "Grant":
        """A request has come; it is under way until its grant is closed. Raises RateLimited."""
        most = self.limits.concurrent_requests
        if most is not None and len(self._grants) >= most:
            told = f"this tenant has {counted(len(self._grants), 'request')} under way and its limit is {most} at once"
            raise beyond("concurrent_requests", RateLimited(f"{told}; try again when one has ended", SOON_S))
        if self._requests is not None:
            if wait := _seconds(self._requests.wait_ns(1)):
                told = f"this tenant's limit of {counted(self._requests.per_minute, 'request')} a minute is used up; "
                raise beyond("requests_per_minute", RateLimited(told + f"try again in {wait} s", wait))
            self._requests.take(1)
        grant = Grant(self)
        self._grants.add(grant)
        return grant

    def _admit_prompts(self, grant: "Grant", lengths: Sequence[int], blocks: int) -> None:
        limits, tokens = self.limits, sum(lengths)
        if limits.prompt_tokens is not None and max(lengths) > limits.prompt_tokens:
            told = f"the prompt has {counted(max(lengths), 'token')}; this tenant's limit is {limits.prompt_tokens} a "
            raise beyond("prompt_tokens", InvalidRequest(told + "prompt", "prompt"))
        self._check_blocks(blocks)
        if self._tokens is not None:
            told, most = f"the request has {counted(tokens, 'prompt token')}", counted(self._tokens.per_minute, "token")
            if tokens > self._tokens.per_minute:
                told += f"; this tenant's limit is {most} a minute, so it could never be served"
                raise beyond("tokens_per_minute", InvalidRequest(told))
            if wait := _seconds(self._tokens.wait_ns(tokens)):
                told += f", and this tenant has {self._tokens.left} left of its {most} a minute; try again in {wait} s"
                raise beyond("tokens_per_minute", RateLimited(told, wait))
        self._take_tokens(tokens)
        grant.kv_blocks = blocks
        self.kv_blocks += blocks

    def _take_tokens(self, count: int) -> None:
        if self._tokens is not None:
            self._tokens.take(count)

    def _release(self, grant: "Grant") -> None:
        if grant in self._grants:
            self._grants.remove(grant)
            self.kv_blocks -= grant.kv_blocks

    def _check_blocks(self, blocks: int) -> None:
        if (most := self.limits.kv_blocks) is None:
            return
        told = f"the request may need {counted(blocks, 'KV block')} for its prompt and max_tokens"
        if blocks > most:
            told += f"; this tenant's limit is {most} in flight, so ask for fewer tokens"
            raise beyond("kv_blocks", InvalidRequest(told))
        if self.kv_blocks + blocks > most:
            told += f", and this tenant has {self.kv_blocks} of its {most} in flight; try again when a request has "
            raise beyond("kv_blocks", RateLimited(told + "ended, or ask for fewer tokens", SOON_S))

    def headers(self) -> dict[str, str]:
        """What is left, in the headers that OpenAI's clients know; those of a limit that is not set are left out."""
        told = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                told[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                told[f"x-ratelimit-remaining-{name}"] = str(bucket.left)
                told[f"x-ratelimit-reset-{name}"] = duration_text(bucket.wait_ns(bucket.per_minute))
        return told

    def check_integrity(self) -> None:
        """Raises AssertionError when the sums are not those of the requests under way."""
        if self.kv_blocks != sum(grant.kv_blocks for grant in self._grants):
            raise AssertionError("the KV blocks reserved are not those of the requests under way")
        for bucket in (self._requests, self._tokens):
            if bucket is not None:
                bucket.check_integrity()


class Grant:
    """One request's part of its tenant's quota, until it is closed. A context manager."""

    def __init__(self, quota: Quota):
        self._quota = quota
        self.kv_blocks = 0

    def take_prompts(self, lengths: Sequence[int], blocks: int) -> None:
        """Count the request's prompts, of so many tokens each, and reserve its KV blocks. To be called once. Raises
        RateLimited, or InvalidRequest where waiting would not help; then nothing more is counted."""
        self._quota._admit_prompts(self, lengths, blocks)

    def take_tokens(self, count: int) -> None:
        """Count generated tokens."""
        self._quota._take_tokens(count)

    def close(self) -> None:
        """The request has ended, however it did. May be repeated."""
        self._quota._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()


class Quotas:
    """The quota of each tenant that has asked for something. One for a router."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._quotas: dict[TenantId, Quota] = {}

    def of(self, tenant: TenantId, limits: TenantLimits) -> Quota:
        """The tenant's quota; `limits` are those of a new one."""
        if tenant not in self._quotas:
            self._quotas[tenant] = Quota(limits, self._clock)
        return self._quotas[tenant]

    def update(self, limits: Mapping[TenantId, TenantLimits]) -> None:
        """The limits of all tenants there are now. The others' use is forgotten."""
        self._quotas = {name: quota for name, quota in self._quotas.items() if name in limits}
        for name, quota in self._quotas.items():
            if quota.limits != limits[name]:
                quota.change(limits[name])


def beyond(limit: str, refusal: KvferryError) -> KvferryError:
    """A refusal that knows for which limit it is, by the name it has in a file; the log tells it."""
    refusal.limit = limit
    return refusal


def blocks_for(prompt: int, max_tokens: int, n: int, block_size: int) -> int:
    """KV blocks that a prompt and its n choices may need: the prompt's full blocks are shared among them."""
    own = -(-(prompt % block_size + max_tokens) // block_size)
    return prompt // block_size + n * own


def duration_text(nanoseconds: int) -> str:
    """A duration as OpenAI's headers have it: `0s`, `120ms`, `7.5s`, `6m0s`. Rounded up to a millisecond."""
    milliseconds = -(-nanoseconds // 10**6)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds


def _seconds(nanoseconds: int) -> int:
    """Whole seconds after which it will be true, as Retry-After has them."""
    return -(-nanoseconds // SECOND_NS)
