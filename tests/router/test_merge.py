"""Streams side by side: nothing lost, order kept, errors and closing reach all of them."""

import asyncio
from contextlib import aclosing

import pytest

from kvferry.router.merge import side_by_side


class Source:
    """`count` items; counts how many are open, and remembers who was closed."""

    def __init__(self):
        self.open = self.most = self.closed = 0

    async def items(self, name: str, count: int, fails: bool = False):
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            for number in range(count):
                await asyncio.sleep(0)
                yield name, number
            if fails:
                raise ValueError(name)
        finally:
            await asyncio.sleep(0)
            self.open -= 1
            self.closed += 1


async def collect(streams, at_once=None):
    async with asyncio.timeout(10), aclosing(side_by_side(streams, at_once)) as items:
        return [item async for item in items]


@pytest.mark.parametrize("at_once", [None, 1, 2, 5])
@pytest.mark.parametrize("counts", [(3,), (0, 4), (5, 1, 0, 7, 2)])
def test_each_keeps_its_order(counts, at_once):
    async def main():
        source = Source()
        got = await collect([source.items(str(i), count) for i, count in enumerate(counts)], at_once)
        for i, count in enumerate(counts):
            assert [number for name, number in got if name == str(i)] == list(range(count))
        assert source.most <= (at_once or len(counts))
        assert source.closed == len(counts)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_they_run_at_the_same_time():
    async def main():
        source = Source()
        got = await collect([source.items("a", 5), source.items("b", 5)])
        assert source.most == 2
        assert {name for name, _ in got[:4]} == {"a", "b"}

    asyncio.run(main())


def test_the_first_error_ends_all():
    async def main():
        source = Source()
        with pytest.raises(ValueError, match="b"):
            await collect([source.items("a", 10**6), source.items("b", 2, fails=True), source.items("c", 10**6)])
        assert (source.open, source.closed) == (0, 3)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@pytest.mark.parametrize("at_once", [None, 1])
def test_closing_it_closes_all(at_once):
    """Also those that have not begun."""

    async def main():
        source = Source()
        async with aclosing(side_by_side([source.items("a", 10**6), source.items("b", 10**6)], at_once)) as items:
            async for _, number in items:
                if number == 3:
                    break
        assert source.open == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_who_is_not_read_from_waits():
    """A slow reader holds the streams back."""

    async def main():
        made = 0

        async def items():
            nonlocal made
            while True:
                made += 1
                yield made

        async with aclosing(side_by_side([items()])) as merged:
            await anext(merged)
            for _ in range(50):
                await asyncio.sleep(0)
        assert made <= 4

    asyncio.run(main())
