"""How many answers of a batch run side by side."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace

import pytest

from kvferry.router.generate import Generator
from kvferry.router.limits import Limits


class Stream:
    """One prompt's answers; of all streams it is told how many are open at once."""

    now = most = 0

    def parts(self, flow: None) -> AsyncIterator[SimpleNamespace]:
        async def said() -> AsyncIterator[SimpleNamespace]:
            type(self).now += 1
            type(self).most = max(self.most, self.now)
            await asyncio.sleep(0)
            yield SimpleNamespace(token_ids=())
            type(self).now -= 1

        return said()


@pytest.mark.parametrize(
    ("n", "prompts", "most"), [(1, 3, 3), (1, 4, 4), (1, 5, 4), (2, 3, 2), (4, 3, 1), (5, 3, 1), (3, 1, 1)]
)
def test_answers_of_a_batch_run_side_by_side_up_to_a_bound(n, prompts, most):
    """Of four at once; one prompt's always do."""
    own = type("Own", (Stream,), {})

    async def main() -> int:
        generator = Generator(None, Limits(choices_at_once=4), None, None, None, None)
        parts = generator._parts(SimpleNamespace(n=n), [own() for _ in range(prompts)], None)
        async with aclosing(parts) as arriving:
            return len([part async for part in arriving])

    assert asyncio.run(main()) == prompts
    assert own.most == most
