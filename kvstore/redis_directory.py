"""The directory of several hosts, in Redis. It holds nobody up: a call has `BUDGET_S`, and a Redis that is slow, gone,
or refuses us costs that once in a while, and all other calls nothing."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
from redis.exceptions import ResponseError

from kvferry.common.clock import Clock, MonotonicClock
from kvferry.common.hashing import SEGMENT
from kvferry.kvstore.announcements import Announcements
from kvferry.kvstore.breaker import Breaker
from kvferry.kvstore.directory import CLAIM_S, HINT_S, PLACES, Holder, Key, State, place_of
from kvferry.kvstore.redis_entries import Decoder, claim_key, encode, hint_key, mark_key, segments, turn_key
from kvferry.kvstore.redis_pipe import Command, Moving, Pipe, Reply, connect, kind_of, sentence_of
from kvferry.kvstore.redis_target import RedisTarget

log = logging.getLogger(__name__)

BUDGET_S = 0.05
LATE_S = 0.01  # a budget whose end is noticed so much later, or of which Redis had less than half, is no fault of Redis
CONNECT_S = 2.0
SMALL = 4 * SEGMENT  # names; a call about more that takes too long is no fault of Redis
CALLS_AT_ONCE = 8
BATCH = 256  # announcements in one round trip
HINT_MS, CLAIM_MS = int(HINT_S * 1000), int(CLAIM_S * 1000)

T = TypeVar("T")


class RedisDirectoryStats(msgspec.Struct, frozen=True):
    """Since the start, unless said otherwise.

    `open`: at the moment, calls are skipped. `errors` by kind; of them `timeout` is Redis not answering in time, and
    `busy` this process not coming to it or asking for much. `announcements_waiting`: at the moment.
    """

    open: bool
    opened: int
    last_fault: str
    calls: int
    skipped: int
    errors: dict[str, int]
    bad_values: int
    announced: int
    announcements_waiting: int
    announcements_dropped: int


class RedisDirectory:
    """Made by `open`. Of what Redis holds, what is not in our format is counted and passed over."""

    def __init__(self, target: RedisTarget, me: Holder, clock: Clock | None = None):
        clock = clock or MonotonicClock()
        self._target = target
        self._me = me
        self._value = encode(me)
        self._place = place_of(me.address)
        self._pipe: Pipe | None = None
        self._marks: list[str] = []  # a key of ours on each server: one that is gone says that the server lost its data
        self._breaker = Breaker(f"the directory at {target}", self._connect, clock)
        self._announcements = Announcements(clock)
        self._something_waits = asyncio.Event()
        self._announcing: asyncio.Task[None] | None = None
        self._at_once = asyncio.Semaphore(CALLS_AT_ONCE)
        self._under_way: set[asyncio.Task] = set()
        self._decode = Decoder(me)
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    @classmethod
    async def open(cls, target: RedisTarget, me: Holder, clock: Clock | None = None) -> "RedisDirectory":
        """Tries to connect first. Without success it goes on trying, and knows nothing until then."""
        directory = cls(target, me, clock)
        await directory._breaker.start()
        directory._announcing = asyncio.create_task(directory._announce_for_ever())
        return directory

    async def announce(self, keys: Sequence[Key]) -> None:
        """Queues them. What was announced lately is not announced again."""
        self._announcements.add(keys)
        if len(self._announcements):
            self._something_waits.set()

    async def locate(self, keys: Sequence[Key]) -> list[tuple[Holder, ...]]:
        """One round trip. If some servers of a cluster fail us, the segments of the others are answered."""

        async def locate(pipe: Pipe) -> list[tuple[Holder, ...]]:
            asked = segments(keys)
            found: list[tuple[Holder, ...]] = []
            replies = await pipe.run([["MGET", *segment] for segment in asked])
            for segment, reply in zip(asked, replies, strict=True):
                if isinstance(reply, Exception):
                    self._saw(reply, pipe)
                    found += [()] * (len(segment) // PLACES)
                else:
                    found += self._decode.holders(reply)
            return found

        return await self._call(locate, [()] * len(keys), small=len(keys) <= SMALL) if keys else []

    async def claim(self, key: Key, *, instead_of: Holder | None = None) -> Holder | None:
        """One round trip; two more where a claim is overwritten."""
        at = claim_key(key)

        async def claim(pipe: Pipe) -> Holder | None:
            won, value = await pipe.run([self._claim(at, "NX"), ["GET", at]])
            if _good(won) is not None:
                return None
            before = _text(value)
            owner = self._decode.holder(before)
            if owner == self._me:
                return None
            if owner is not None and owner != instead_of and owner.address != self._me.address:
                return owner
            return await self._take_over(pipe, key, before)

        return await self._call(claim, None)

    async def renew(self, keys: Sequence[Key]) -> None:
        """Two round trips."""
        claims = [claim_key(key) for key in keys]

        async def renew(pipe: Pipe) -> None:
            values = await pipe.run([["GET", at] for at in claims])
            ours = [at for at, value in zip(claims, values, strict=True) if _text(value) == self._value]
            # PEXPIRE, for a SET would overwrite who took it over meanwhile
            for reply in await pipe.run([["PEXPIRE", at, CLAIM_MS] for at in ours]) if ours else ():
                _good(reply)

        if claims:
            await self._call(renew, None)

    async def close(self) -> None:
        """Calls under way end first, later ones are answered as on a miss. What still waits is not announced."""
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
        await self._breaker.close()
        await asyncio.gather(*self._under_way)
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            await pipe.close()

    @property
    def state(self) -> State:
        return "up" if self._breaker.closed else "down"

    def stats(self) -> RedisDirectoryStats:
        return RedisDirectoryStats(
            open=not self._breaker.closed,
            opened=self._breaker.opened,
            last_fault=self._breaker.last_fault,
            calls=self._counts["calls"],
            skipped=self._counts["skipped"],
            errors=dict(self._errors),
            bad_values=self._decode.bad,
            announced=self._counts["announced"],
            announcements_waiting=len(self._announcements),
            announcements_dropped=self._announcements.dropped,
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the parts are whole and a closed breaker has a pipe behind it."""
        self._breaker.check_integrity()
        self._announcements.check_integrity()
        if self._breaker.closed and self._pipe is None:
            raise RuntimeError("the directory has no connection and does not look for one")

    async def _take_over(self, pipe: Pipe, key: Key, before: Reply) -> Holder | None:
        """Overwrite a claim that was `before`; else who has done that. Many may want to at once: they take turns, and
        whose turn it is looks again."""
        at, turn = claim_key(key), turn_key(key)
        won, *values = await pipe.run([self._claim(turn, "NX"), ["GET", turn], ["GET", at]])
        mine, (taker, now) = _good(won) is not None, map(_text, values)
        untouched = now is None or now == before
        if mine:
            taking = [self._claim(at, "NX" if now is None else "XX")] if untouched else []
            for reply in await pipe.run([*taking, ["PEXPIRE", turn, 0]]):  # which ends the turn
                _good(reply)
        if mine and untouched:
            return None
        owner = self._decode.holder(taker if untouched else now)
        return owner if owner != self._me else None

    async def _call(self, ask: Callable[[Pipe], Awaitable[T]], otherwise: T, small: bool = True) -> T:
        """What `ask` gives within the budget, or else `otherwise`. A caller's cancellation does not interrupt it: there
        may be half an answer on the connection."""
        self._counts["calls"] += 1
        if not self._breaker.closed:
            self._counts["skipped"] += 1
            return otherwise
        call = asyncio.create_task(self._within_budget(ask, otherwise, small))
        self._under_way.add(call)
        call.add_done_callback(self._under_way.discard)
        return await asyncio.shield(call)

    async def _within_budget(self, ask: Callable[[Pipe], Awaitable[T]], otherwise: T, small: bool) -> T:
        now = asyncio.get_running_loop().time
        pipe, asked = None, now() + BUDGET_S  # not yet
        try:
            async with asyncio.timeout(BUDGET_S) as budget, self._at_once:
                if (pipe := self._pipe) is not None:
                    asked = now()
                    return await ask(pipe)
        except TimeoutError as error:
            if not small or budget.when() - asked < BUDGET_S / 2 or now() - budget.when() > LATE_S:
                self._errors["busy"] += 1
            else:
                self._saw(error, pipe)
        except Exception as error:
            self._saw(error, pipe)
        return otherwise

    def _saw(self, error: Exception, pipe: Pipe | None) -> None:
        """Count an error, and leave Redis alone for a while."""
        kind = kind_of(error)
        self._errors[kind] += 1
        if kind == "bug":
            log.error("a call of the directory failed", exc_info=error)
        if pipe is self._pipe and not isinstance(error, Moving):
            self._breaker.fail(sentence_of(error))

    async def _connect(self) -> str:
        """Anew, from the URL and the files: what failed may be elsewhere now. What is wrong, or nothing."""
        before, self._pipe = self._pipe, None
        if before is not None:
            await before.close()
        pipe = None
        try:
            async with asyncio.timeout(CONNECT_S):
                pipe = await connect(self._target)
                marks = [mark_key(self._me, tag) for tag in pipe.tags()]
                await self._try(pipe, marks)
            async with asyncio.timeout(BUDGET_S):
                await self._try(pipe, marks)
            self._pipe, self._marks = pipe, marks
        except Exception as error:
            kind = kind_of(error)
            self._errors[kind] += 1
            if kind == "bug":
                log.error("connecting to the directory failed", exc_info=error)
            return sentence_of(error)
        finally:
            if pipe is not None and pipe is not self._pipe:
                await pipe.close()
        self._announcements.forget()  # it may be an empty Redis
        return ""

    async def _try(self, pipe: Pipe, marks: list[str]) -> None:
        """Each command that we use, on each server, in one round trip. Raises what is wrong."""
        commands: list[Command] = []
        for at in marks:
            commands += [["SET", at, self._value, "PX", HINT_MS], ["MGET", at], ["GET", at], ["PEXPIRE", at, HINT_MS]]
        for command, reply in zip(commands, await pipe.run(commands), strict=True):
            if _good(reply) in (None, [None], 0):
                raise ResponseError(f"{command[0]} does not find what was just written")

    async def _announce_for_ever(self) -> None:
        while True:
            await self._something_waits.wait()
            await self._breaker.wait_closed()
            keys = self._announcements.take(BATCH)
            if await self._call(lambda pipe, keys=keys: self._tell(pipe, keys), False):
                self._counts["announced"] += len(keys)
            else:
                self._announcements.put_back(keys)
            if not len(self._announcements):
                self._something_waits.clear()

    async def _tell(self, pipe: Pipe, keys: Sequence[Key]) -> bool:
        marks = [["SET", mark, self._value, "XX", "PX", HINT_MS] for mark in self._marks]
        hints = [["SET", hint_key(key, self._place), self._value, "PX", HINT_MS] for key in keys]
        replies = await pipe.run(marks + hints)
        for reply in replies:
            if not isinstance(reply, Moving):  # one hint the less
                _good(reply)
        if None in replies[: len(marks)]:  # what else was told is gone, too
            self._announcements.forget()
            for reply in await pipe.run([["SET", mark, self._value, "PX", HINT_MS] for mark in self._marks]):
                _good(reply)
        return True

    def _claim(self, at: str, when: str) -> Command:
        return ["SET", at, self._value, when, "PX", CLAIM_MS]


def _good(reply: Reply) -> Reply:
    """Raises a reply that is an error."""
    if isinstance(reply, Exception):
        raise reply
    return reply


def _text(reply: Reply) -> Reply:
    """The same, but what is not text is a bad value, not an error."""
    return b"" if isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE") else _good(reply)
