"""Whose turn a thread is: tenants one after the other, each one's own in order, and nobody beyond its time."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from kvferry.router.turns import Turns


class Taken:
    """`Turns` whose threads all do one thing until they are let `go`; `order` has what they did after it."""

    def __init__(self, threads: int = 1, of: type[Turns] = Turns):
        self.turns, self.order, self._go = of("test", threads), [], threading.Event()
        self._first = [asyncio.create_task(self.turns.run("first", lambda: self._go.wait(30))) for _ in range(threads)]
        self._tasks: list[asyncio.Task] = []

    async def ask(self, *names: str) -> list[asyncio.Task]:
        """The tenant is the first letter."""
        tasks = [asyncio.create_task(self.turns.run(name[0], partial(self.order.append, name))) for name in names]
        self._tasks += tasks
        await asyncio.sleep(0)
        self.turns.check_integrity()
        return tasks

    async def done(self) -> list[str]:
        self._go.set()
        await asyncio.gather(*self._first)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)
        self.turns.check_integrity()
        assert await asyncio.wait_for(self.turns.run("last", lambda: 7), 10) == 7, "a thread is free again"
        self.turns.close()
        return self.order


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(in_time())


def test_tenants_are_served_in_turn():
    async def scenario() -> None:
        taken = Taken()
        await taken.ask("a1", "a2", "a3", "a4", "b1", "b2", "c1")
        await taken.ask("b3")
        assert await taken.done() == ["a1", "b1", "c1", "a2", "b2", "a3", "b3", "a4"]

    run(scenario)


def test_who_is_out_of_time_waits_no_longer():
    """And is not waited for: its turn is the next one's."""

    async def scenario() -> None:
        taken = Taken()
        a1, b1, a2, c1 = await taken.ask("a1", "b1", "a2", "c1")
        for task in (b1, a2):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        taken.turns.check_integrity()
        assert await taken.done() == ["a1", "c1"]
        assert a1.done()
        assert c1.done()

    run(scenario)


def test_cancelled_at_the_moment_its_turn_comes():
    """It has been given the turn, and has not run since."""

    class Cancelling(Turns):
        def _next(self, done: asyncio.Future | None = None) -> None:
            super()._next(done)
            asking.pop().cancel() if asking else None

    async def scenario() -> None:
        taken = Taken(of=Cancelling)
        a1, _ = await taken.ask("a1", "b1")
        given = taken.turns._waiting["a"][0]
        asking.append(a1)
        assert await taken.done() == ["b1"]
        assert a1.cancelled()
        assert not given.cancelled()

    asking: list[asyncio.Task] = []

    run(scenario)


def test_what_has_begun_keeps_its_thread():
    """Whoever asked for it may have gone; nobody is let in before it has ended."""

    async def scenario() -> None:
        taken = Taken()
        await asyncio.sleep(0.05)
        taken._first[0].cancel()
        await taken.ask("a1")
        await asyncio.sleep(0.05)
        assert taken.order == []
        taken._first.clear()
        assert await taken.done() == ["a1"]

    run(scenario)


def test_an_error_is_its_own():
    async def scenario() -> None:
        taken = Taken(threads=2)
        failing = asyncio.create_task(taken.turns.run("a", lambda: 1 / 0))
        await taken.ask("b1")
        assert await taken.done() == ["b1"]
        with pytest.raises(ZeroDivisionError):
            await failing

    run(scenario)


def test_as_many_at_once_as_there_are_threads():
    async def scenario() -> None:
        turns, meeting = Turns("test", 3), threading.Barrier(3, timeout=30)
        await asyncio.gather(*[turns.run("a", meeting.wait) for _ in range(9)])
        turns.check_integrity()
        turns.close()
        with pytest.raises(RuntimeError):
            await turns.run("a", lambda: None)

    run(scenario)
