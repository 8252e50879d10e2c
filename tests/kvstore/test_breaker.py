"""A breaker opens at once, tries less and less often, and says so when it opens, when something else is wrong, and when
it closes."""

import asyncio
import logging

import pytest

from kvferry.common.clock import ManualClock
from kvferry.kvstore import breaker as breaker_module
from kvferry.kvstore.breaker import CALM_S, Breaker


class Thing:
    """What the breaker guards. `fault`: what is wrong with it, or nothing."""

    def __init__(self, fault=""):
        self.fault = fault
        self.tries = 0

    async def mend(self):
        self.tries += 1
        return self.fault


@pytest.fixture
def waits(monkeypatch):
    """How long it waited each time; none takes any time. A thing can be mended from within."""
    waited = []
    real = asyncio.sleep

    async def sleep(seconds):
        waited.append(seconds)
        await real(0)

    monkeypatch.setattr(breaker_module.asyncio, "sleep", sleep)
    return waited


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "kvferry")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


async def turns(count):
    for _ in range(count):
        await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=0)


def test_the_longer_it_lasts_the_less_it_is_tried(waits, lines):
    async def story():
        clock, thing = ManualClock(), Thing()
        breaker = Breaker("the thing", thing.mend, clock)
        await breaker.start()
        breaker.check_integrity()
        assert breaker.closed
        assert lines() == []
        thing.fault = "it is broken"
        breaker.fail("it broke")
        breaker.fail("it is still broken")
        breaker.check_integrity()
        assert (breaker.closed, breaker.opened, breaker.last_fault) == (False, 1, "it is still broken")
        clock.advance(42)
        await turns(30)
        assert waits[:7] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
        assert breaker.last_fault == "it is broken"
        thing.fault = ""
        await asyncio.wait_for(breaker.wait_closed(), 5)
        breaker.check_integrity()
        assert lines() == [
            ("WARNING", "the thing is not used until it works again: it broke"),
            ("WARNING", "the thing still does not work: it is broken"),
            ("INFO", "the thing is used again, after 42.0 s"),
        ]
        await breaker.close()

    asyncio.run(story())


def test_another_reason_is_told_once(waits, lines):
    """It was not there, and is there and refuses us now: a user who did not know would look for the wrong fault."""

    async def story():
        thing = Thing("it is not there: error 111")
        breaker = Breaker("the thing", thing.mend, ManualClock())
        await breaker.start()
        await turns(5)
        thing.fault = "it is not there: error 113"
        await turns(5)
        assert breaker.last_fault == thing.fault
        assert lines() == [("WARNING", "the thing is not used until it works again: it is not there: error 111")]
        thing.fault = "it does not accept our password"
        await turns(20)
        breaker.check_integrity()
        assert lines()[1:] == [("WARNING", "the thing still does not work: it does not accept our password")]
        thing.fault = ""
        await asyncio.wait_for(breaker.wait_closed(), 5)
        assert [level for level, _ in lines()] == ["WARNING", "WARNING", "INFO"]
        await breaker.close()

    asyncio.run(story())


def test_what_fails_again_soon_waits_on(waits):
    async def story():
        clock, thing = ManualClock(), Thing()
        breaker = Breaker("the thing", thing.mend, clock)
        await breaker.start()
        for _ in range(3):
            clock.advance(CALM_S - 0.1)
            breaker.fail("it broke")
            await asyncio.wait_for(breaker.wait_closed(), 5)
        assert waits == [0.2, 0.4, 0.8]
        clock.advance(CALM_S)
        breaker.fail("it broke")
        await asyncio.wait_for(breaker.wait_closed(), 5)
        assert waits[3:] == [0.2]
        assert breaker.opened == 4
        await breaker.close()

    asyncio.run(story())


def test_what_does_not_start_is_mended_in_the_background(waits, lines):
    async def story():
        thing = Thing("it is not there")
        breaker = Breaker("the thing", thing.mend, ManualClock())
        await breaker.start()
        assert (breaker.closed, breaker.opened, thing.tries) == (False, 1, 1)
        breaker.check_integrity()
        await turns(5)
        thing.fault = ""
        await asyncio.wait_for(breaker.wait_closed(), 5)
        assert [level for level, _ in lines()] == ["WARNING", "INFO"]
        await breaker.close()

    asyncio.run(story())


def test_a_closed_directory_tries_no_more(waits):
    async def story():
        thing = Thing("it is not there")
        breaker = Breaker("the thing", thing.mend, ManualClock())
        await breaker.start()
        await breaker.close()
        tries = thing.tries
        await turns(5)
        assert thing.tries == tries
        assert not breaker.closed
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(story())
