"""What a tenant's line in the file means behind the door: its weight goes with every sequence, and a job whose tenant
is erased ends wherever it is. No process behind it."""

import asyncio
from contextlib import aclosing
from types import SimpleNamespace

import pytest

from kvferry.common.block import BlockLayout
from kvferry.common.clock import ManualClock
from kvferry.common.config import RouterConfig
from kvferry.common.errors import Unauthenticated, Unavailable
from kvferry.common.hashing import TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.common.store_api import Match
from kvferry.router import flow as flow_module
from kvferry.router.accounting import Metrics, Record
from kvferry.router.flow import Flow, Job, Progress
from kvferry.router.handover import Piece
from kvferry.router.nodes import ServedModel

ACME, BOLT = (TenantKeys.of(bytes([n]) * 32) for n in (1, 2))
MODEL = ServedModel("m", "m", b"f" * 32, BlockLayout(1, 1, 16, 8, "float32"), 300, 64)


class Handed:
    """In the place of a `Handover`: gives one token once it is admitted, then stands still until it is aborted."""

    ended = closed = False

    def __init__(self, worker, sequence):
        self.worker, self.sequence, self._why = worker, sequence, asyncio.Queue()
        worker.handed.append(self)

    async def open(self, admission_s):
        admitted, aborted = (asyncio.create_task(one) for one in (self.worker.may_admit.wait(), self._why.get()))
        try:
            await asyncio.wait({admitted, aborted}, return_when=asyncio.FIRST_COMPLETED)
            if aborted.done():
                raise aborted.result()
        finally:
            admitted.cancel()
            aborted.cancel()

    def abort(self, why):
        self._why.put_nowait(why)

    def end_choice(self, choice):
        return

    async def pieces(self, clock, give_up):
        yield Piece((7,))
        raise await self._why.get()

    async def close(self):
        self.closed = True


class Worker:
    """Admits everything, when it may."""

    def __init__(self):
        self.handed: list[Handed] = []
        self.may_admit = asyncio.Event()
        self.may_admit.set()

    def hand(self, sequence, placement, nodes, record, metrics):
        return Handed(self, sequence)


@pytest.fixture
def worker():
    return Worker()


@pytest.fixture
def flow(monkeypatch, worker):
    async def lookup(span, lease):
        return Match()

    async def ready_again(model, give_up):
        assert model == MODEL

    config = RouterConfig(model="m", prefill=(), decode=("unix:/nowhere",), store="s")

    async def tell():
        return

    nodes = SimpleNamespace(partners=lambda decode: [], tell=tell)
    flow = Flow(config, nodes, None, SimpleNamespace(lookup=lookup), Metrics(), ManualClock())
    monkeypatch.setattr(flow_module, "Handover", worker.hand)
    monkeypatch.setattr(flow, "_ready_again", ready_again)
    monkeypatch.setattr(flow, "_running", lambda model: [SimpleNamespace(ready=True, model=MODEL)])
    return flow


async def run(flow: Flow, keys: TenantKeys, got: list[int], n: int = 1) -> None:
    job = Job("r", MODEL, keys, "", [1, 2, 3], SamplingParams(max_tokens=9, n=n), weight=2.5)
    async with aclosing(flow.run(job, Record("r", 3, 0.0), Progress(job))) as pieces:
        async for piece in pieces:
            got += piece.token_ids


async def as_far_as_it_goes() -> None:
    """Nothing here waits for anything outside of the loop."""
    for _ in range(50):
        await asyncio.sleep(0)


async def begun(flow: Flow, keys: TenantKeys, n: int = 1) -> tuple[asyncio.Task, list[int]]:
    got: list[int] = []
    task = asyncio.create_task(run(flow, keys, got, n))
    await as_far_as_it_goes()
    return task, got


def test_the_weight_goes_with_the_sequence(flow, worker):
    async def main():
        task, got = await begun(flow, ACME)
        assert got == [7]
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert [handed.sequence.weight for handed in worker.handed] == [2.5]


def test_erased_in_mid_stream(flow, worker):
    async def main():
        task, got = await begun(flow, ACME)
        flow.take_tenants(frozenset({ACME.pseudonym}))
        await as_far_as_it_goes()
        assert not task.done(), "another tenant was erased"
        flow.take_tenants(frozenset({BOLT.pseudonym}))
        with pytest.raises(Unauthenticated, match="the tenant of this API key was erased"):
            await asyncio.wait_for(task, 5)
        assert got == [7]

    asyncio.run(main())
    assert [handed.closed for handed in worker.handed] == [True], "it is not tried again"


@pytest.mark.parametrize("why", ["erased", "stopped"])
def test_it_ends_while_it_waits_for_its_place(flow, worker, why):
    """At once, not when it has one."""

    async def main():
        worker.may_admit.clear()
        task, got = await begun(flow, ACME)
        if why == "erased":
            flow.take_tenants(frozenset({BOLT.pseudonym}))
        else:
            await flow.stop()
        with pytest.raises(Unauthenticated if why == "erased" else Unavailable):
            await asyncio.wait_for(task, 5)
        assert got == []

    asyncio.run(main())
    assert [handed.closed for handed in worker.handed] == [True]
    assert not flow._active


def test_erased_before_it_is_placed_and_there_again(flow, worker):
    flow.take_tenants(frozenset())
    with pytest.raises(Unauthenticated):
        asyncio.run(run(flow, ACME, []))
    assert worker.handed == []
    flow.take_tenants(frozenset({ACME.pseudonym}))

    async def main():
        task, got = await begun(flow, ACME)
        assert got == [7]
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())


def test_erased_while_its_choices_go_on_apart(flow, worker):
    """The first attempt of two choices breaks; each is then on its own handover."""

    async def main():
        task, got = await begun(flow, ACME, n=2)
        assert got == [7]
        worker.handed[0].abort(Unavailable("broke"))
        await as_far_as_it_goes()
        assert len(worker.handed) == 3
        flow.take_tenants(frozenset({BOLT.pseudonym}))
        with pytest.raises(Unauthenticated):
            await asyncio.wait_for(task, 5)

    asyncio.run(main())
    assert all(handed.closed for handed in worker.handed)
