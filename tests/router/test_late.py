"""A router with much to do at once: each turn of its loop is short, and a loop that is late takes nobody for dead."""

import asyncio
import time

import pytest
from fronts import CONFIG, UP

from kvferry.cli.demo_model import byte_tokenizer
from kvferry.common.clock import MonotonicClock
from kvferry.common.errors import Overloaded
from kvferry.common.hashing import TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.common.store_api import Match
from kvferry.router import flow as flow_module
from kvferry.router import nodes as nodes_module
from kvferry.router.accounting import Metrics, Record
from kvferry.router.defaults import NO_DEFAULTS
from kvferry.router.flow import INLINE_TOKENS, Flow, Job, Progress
from kvferry.router.models import Models, TextSide
from kvferry.router.nodes import Nodes, patiently
from kvferry.router.text import Tokenizer


@pytest.mark.parametrize(("tokens", "apart"), [(INLINE_TOKENS, False), (INLINE_TOKENS + 1, True)])
def test_long_prompts_are_worked_on_one_a_turn(tokens, apart, monkeypatch):
    """However many come at once; what is short is not held back."""
    turn, seen = 0, []

    class Handover:
        def __init__(self, *given):
            return

        async def open(self, patience_s):
            raise Overloaded("full")

        async def close(self):
            return

    class Store:
        async def lookup(self, span, lease):
            return Match()

    class Scope(flow_module.CacheScope):
        def chain(self, *given):
            seen.append(turn)
            return super().chain(*given)

    to_wire = flow_module.sequence_to_wire
    monkeypatch.setattr(flow_module, "Handover", Handover)
    monkeypatch.setattr(flow_module, "CacheScope", Scope)
    monkeypatch.setattr(flow_module, "sequence_to_wire", lambda *given: seen.append(turn) or to_wire(*given))

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def main() -> None:
        nodes = Nodes((), CONFIG.decode)
        nodes.decode[0].status, nodes.decode[0].subscription.open = UP, True
        models = Models(nodes, own_defaults=False)
        models.add("place", TextSide(Tokenizer(byte_tokenizer()), NO_DEFAULTS))
        flow = Flow(CONFIG, nodes, models, Store(), Metrics(), MonotonicClock())
        job = Job("r", nodes.decode[0].model, TenantKeys.of(b"k" * 32), "", [7] * tokens, SamplingParams())

        async def ask() -> None:
            with pytest.raises(Overloaded):
                await anext(flow.run(job, Record("r", tokens, MonotonicClock().now()), Progress(job)))

        counting = asyncio.create_task(count())
        await asyncio.gather(*[ask() for _ in range(20)])
        counting.cancel()
        await nodes.close()

    asyncio.run(main())
    assert len(seen) == 40
    assert (len(set(seen)) == 40) == apart


def test_a_node_is_not_silent_while_this_process_does_not_listen(monkeypatch):
    monkeypatch.setattr(nodes_module, "SILENT_S", 0.5)
    monkeypatch.setattr(nodes_module, "LOOK_S", 0.05)

    async def main() -> None:
        said = asyncio.get_running_loop().create_future()
        reading = asyncio.create_task(patiently(said))
        await asyncio.sleep(0)
        time.sleep(1)  # noqa: ASYNC251 - the loop is late, and what was said meanwhile is heard after it
        asyncio.get_running_loop().call_soon(said.set_result, 7)
        assert await reading == 7

    asyncio.run(main())


def test_a_node_that_says_nothing_is_silent(monkeypatch):
    """What was read of it is given up; what it breaks off with is told."""
    monkeypatch.setattr(nodes_module, "SILENT_S", 0.2)
    monkeypatch.setattr(nodes_module, "LOOK_S", 0.05)

    async def main() -> None:
        silent, broken = (asyncio.get_running_loop().create_future() for _ in range(2))
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            await patiently(silent)
        assert time.monotonic() - begun >= 0.19
        assert silent.cancelled()
        broken.set_exception(ConnectionError("gone"))
        with pytest.raises(ConnectionError):
            await patiently(broken)

    asyncio.run(main())
