"""Failpoints: inert unless armed, and a spec that is not understood is refused."""

import asyncio
import os
import signal

import pytest

from kvferry.common.errors import ConfigError
from kvferry.common.failpoints import Failpoints


@pytest.fixture
def acted(monkeypatch):
    """What a failpoint did, instead of doing it."""
    done = []
    monkeypatch.setattr(os, "kill", lambda pid, number: done.append((pid == os.getpid(), number)))

    async def sleep(seconds):
        done.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return done


def hit(specs, *names):
    async def main():
        failpoints = Failpoints(specs)
        for name in names:
            await failpoints.hit(name)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("action", "outcome"),
    [("stop", (True, signal.SIGSTOP)), ("kill", (True, signal.SIGKILL)), ("sleep:1.5", 1.5), ("sleep:2", 2.0)],
)
def test_actions(acted, action, outcome):
    hit((f"a={action}",), "b", "a", "b", "a")
    assert acted == [outcome, outcome]


def test_the_nth_hit_only(acted):
    hit(("a=sleep:1@2", "b=sleep:2@1"), "a", "b", "a", "a", "b")
    assert acted == [2.0, 1.0]


def test_without_specs_nothing_happens(acted):
    hit((), "a", "b")
    assert acted == []


@pytest.mark.parametrize("spec", ["a", "a=", "a=explode", "a=sleep", "a=sleep:", "a=sleep:x", "a=stop@x", "a=sleep:-1"])
def test_what_is_not_understood_is_refused(spec):
    with pytest.raises(ConfigError, match="failpoint"):
        Failpoints((spec,))
