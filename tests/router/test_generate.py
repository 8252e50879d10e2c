"""How many answers of a batch run side by side, where answers are made bytes of, and how what is a bug counts."""

import asyncio
import threading
from array import array
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvferry.cli.demo_model import byte_tokenizer
from kvferry.common.clock import MonotonicClock
from kvferry.common.hashing import TenantKeys
from kvferry.common.sampling import TokenLogprobs
from kvferry.router import generate as generate_module
from kvferry.router.accounting import Metrics, Record
from kvferry.router.answers import Answer
from kvferry.router.choices import Part
from kvferry.router.generate import INLINE_CHARS, Generator
from kvferry.router.limits import Limits
from kvferry.router.logprobs import Told
from kvferry.router.openai import parse_request
from kvferry.router.tenants import Tenant
from kvferry.router.text import Tokenizer


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


def test_what_was_not_foreseen_counts_as_our_failure(caplog):
    """Not as a client that has gone."""
    caplog.set_level("INFO")

    class Flow:
        def give_up(self, arrived: float, timeout_s: float | None) -> float:
            raise ZeroDivisionError("a bug")

    async def main() -> None:
        generator = Generator(None, Limits(), None, Flow(), metrics, MonotonicClock())
        with pytest.raises(ZeroDivisionError):
            await generator.answer({"id": "r"}, parse_request("completion", b'{"prompt":"a"}'), tenant, None)

    metrics, tenant = Metrics(), Tenant("acme", TenantKeys.of(b"k" * 32))
    asyncio.run(main())
    assert metrics.registry.get_sample_value("kvferry_requests_total", {"outcome": "internal_error"}) == 1
    assert metrics.registry.get_sample_value("kvferry_requests_total", {"outcome": "cancelled"}) is None
    assert [record.getMessage().split(", ")[0] for record in caplog.records] == [
        f"completion for tenant {tenant.keys.pseudonym}: internal_error"
    ]


SEVERAL = tuple(Told(1, TokenLogprobs(-1.0, 0, ((1, -1.0),) * 9), 0) for _ in range(101))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("part", "prompt", "aside"),
    [
        (Part(0, "a" * (INLINE_CHARS - 10), (), "length"), 10, False),
        (Part(0, "a" * (INLINE_CHARS + 1), (), "length"), 10, True),
        (Part(0, "", (7,) * (INLINE_CHARS + 1), "length"), 10, True),
        (Part(0, "a", (7,), "length", SEVERAL[:99]), 10, False),
        (Part(0, "a", (7,), "length", SEVERAL), 10, True),
        (Part(0, "a", (7,), "length"), INLINE_CHARS + 1, True),
    ],
)
def test_a_large_answer_is_made_aside(part, prompt, aside, stream, monkeypatch):
    """Whatever makes it large: else nobody is served meanwhile."""
    where = set()
    for name in ("whole", "chunks"):
        made = getattr(Answer, name)

        def noted(*given, made=made):
            where.add(threading.current_thread() is threading.main_thread())
            return made(*given)

        monkeypatch.setattr(Answer, name, noted)

    class Events:
        response, started = None, True

        def __init__(self, *given):
            return

        async def data(self, payload: bytes = b"") -> None:
            return

        done = data

    async def sent(*given) -> None:
        return

    monkeypatch.setattr(generate_module, "EventStream", Events)
    monkeypatch.setattr(generate_module, "send_json", sent)
    asked = parse_request("completion", b'{"prompt":"a","return_token_ids":true,"logprobs":9}')
    job = SimpleNamespace(token_ids=array("I", [7]) * prompt)
    told = [SimpleNamespace(job=job, record=Record("r", prompt, 0.0), tokenizer=Tokenizer(byte_tokenizer()))]

    async def parts(*given):
        yield part

    async def main() -> None:
        generator = Generator(None, Limits(), None, None, None, None)
        monkeypatch.setattr(generator, "_parts", parts)
        await (generator._stream if stream else generator._whole)({"id": "r"}, replace(asked, model="m"), told, None)

    asyncio.run(main())
    assert where == {not aside}
