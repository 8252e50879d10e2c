"""The front by itself: what it says of workers that are there or not, and how a request that took too long ends."""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from aiohttp import ClientSession
from fronts import CONFIG, UP, another, with_house

from kvferry.cli.demo_model import byte_tokenizer
from kvferry.common.clock import ManualClock
from kvferry.common.errors import DeadlineExceeded, Overloaded, Unauthenticated, Unavailable
from kvferry.common.hashing import TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.common.store_api import Match
from kvferry.router import flow as flow_module
from kvferry.router.accounting import Metrics, Record
from kvferry.router.defaults import NO_DEFAULTS
from kvferry.router.flow import Flow, Job, Progress
from kvferry.router.handover import Piece
from kvferry.router.models import Models, TextSide
from kvferry.router.nodes import Nodes
from kvferry.router.quota import TenantLimits
from kvferry.router.tenants import Tenant
from kvferry.router.text import Tokenizer


def with_front(use: Callable[[Nodes, ClientSession, str], Awaitable[None]], *more: object, **named: object) -> None:
    with_house(lambda house: use(house.nodes, house.http, house.api), *more, **named)


def test_models_are_those_that_are_up():
    async def use(nodes: Nodes, session: ClientSession, url: str) -> None:
        async with session.get(f"{url}/v1/models") as answer:
            assert (await answer.json())["data"] == []
        async with session.get(f"{url}/v1/models/name") as answer:
            assert (answer.status, "Retry-After" in answer.headers) == (503, True)
        asked = {"model": "name", "prompt": "a"}
        for path in ("/v1/completions", "/tokenize"):
            async with session.post(url + path, data=json.dumps(asked)) as answer:
                assert (answer.status, "Retry-After" in answer.headers) == (503, True)
        nodes.decode[0].status, nodes.decode[0].subscription.open = UP, True
        async with session.get(f"{url}/v1/models/name") as answer:
            assert (await answer.json())["id"] == "name"
        async with session.get(f"{url}/v1/models/m") as answer:
            assert answer.status == 404

    with_front(use)


def test_a_model_is_there_under_each_of_its_names():
    async def use(nodes: Nodes, session: ClientSession, url: str) -> None:
        nodes.decode[0].status, nodes.decode[0].subscription.open = another(other_names=["nick", "org/nick"]), True
        async with session.get(f"{url}/v1/models") as answer:
            assert [one["id"] for one in (await answer.json())["data"]] == ["name", "nick", "org/nick"]
        for name in ("name", "nick", "org/nick"):
            async with session.get(f"{url}/v1/models/{name}") as answer:
                assert (answer.status, (await answer.json())["id"]) == (200, name)
            async with session.post(f"{url}/tokenize", data=json.dumps({"model": name, "prompt": "a"})) as answer:
                assert answer.status == 200

    with_front(use)


def test_no_more_answers_are_promised_than_workers_give():
    """By the document, and by the refusal of more, once they have said how many that are."""

    async def use(nodes: Nodes, session: ClientSession, url: str) -> None:
        async def promised() -> int:
            async with session.get(f"{url}/openapi.json") as answer:
                schema = (await answer.json())["components"]["schemas"]["CompletionBody"]["properties"]["n"]
            return schema["anyOf"][0]["maximum"]

        assert await promised() == 64
        nodes.decode[0].status, nodes.decode[0].subscription.open = another(max_choices=8), True
        assert await promised() == 8
        async with session.post(f"{url}/v1/completions", data=json.dumps({"prompt": "a", "n": 9})) as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["param"]) == (400, "n")
        assert error["message"] == "n is 9; the workers of name give at most 8 answers to a prompt"

    with_front(use)


POSTED = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


async def half_a_body(url: str, path: str, sent: int) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    writer.write(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n".encode() + b" " * sent)
    await writer.drain()
    await asyncio.sleep(0.1)
    return writer


async def refused(session: ClientSession, url: str, body: bytes) -> dict[str, str | None]:
    """Why a body is, by path."""
    found = {}
    for path in POSTED:
        async with session.post(url + path, data=body) as answer:
            error = (await answer.json())["error"]
            assert ("Retry-After" in answer.headers) == (answer.status == 503)
            found[path] = error["message"] if error["code"] == "overloaded" else None
    return found


@pytest.mark.parametrize("path", POSTED)
def test_what_is_not_sent_yet_has_its_place(path):
    """Whoever is one too many is refused before its body is read, on every path."""

    async def use(nodes: Nodes, session: ClientSession, url: str) -> None:
        writer = await half_a_body(url, path, 0)
        told = "this server serves 1 request already; try again later"
        assert await refused(session, url, b"{") == dict.fromkeys(POSTED, told)
        writer.close()
        await asyncio.sleep(0.1)
        assert await refused(session, url, b"{") == dict.fromkeys(POSTED)

    with_front(use, replace(CONFIG, max_concurrent=1))


@pytest.mark.parametrize("path", POSTED)
def test_all_bodies_that_are_being_sent_are_bounded_together(path):
    async def use(nodes: Nodes, session: ClientSession, url: str) -> None:
        writer = await half_a_body(url, path, 900)
        assert await refused(session, url, b"{" * 99) == dict.fromkeys(POSTED)
        assert await refused(session, url, b"{" * 100) == dict.fromkeys(POSTED)
        told = "the bodies of other requests take 900 of the 1000 bytes that this server has for them; try again later"
        assert await refused(session, url, b"{" * 101) == dict.fromkeys(POSTED, told)
        writer.close()
        await asyncio.sleep(0.1)
        assert await refused(session, url, b"{" * 2000) == dict.fromkeys(POSTED)

    with_front(use, replace(CONFIG, max_bodies_bytes=1000))


@pytest.mark.parametrize(
    ("limits", "lengths", "statuses"),
    [
        ({"prompt_tokens": 10}, (8, 9, 10), [200, 200, 400]),  # and one that begins every text
        ({"tokens_per_minute": 20}, (9, 9, 9), [200, 200, 429]),
        ({"tokens_per_minute": 20}, (20,), [400]),
        ({"requests_per_minute": 2}, (1, 1, 1), [200, 200, 429]),
    ],
)
def test_a_tenants_limits_are_those_of_tokenize_too(limits, lengths, statuses):
    class Tenants:
        def authenticate(self, header):
            return Tenant("acme", TenantKeys.of(b"k" * 32), TenantLimits(**limits))

    async def use(nodes: Nodes, session: ClientSession, url: str) -> None:
        nodes.decode[0].status, nodes.decode[0].subscription.open = UP, True
        found = []
        for length in lengths:
            async with session.post(f"{url}/tokenize", data=json.dumps({"prompt": "a" * length})) as answer:
                found.append(answer.status)
        assert found == statuses

    with_front(use, tenants=Tenants())


def test_the_log_tells_whose_request_is_refused_and_by_which_limit(caplog):
    """As it tells of those that are answered: by the tenant's pseudonym, which `kvferry tenants list` shows."""
    caplog.set_level("INFO")

    class Tenants:
        def authenticate(self, header):
            if header is None:
                raise Unauthenticated("no API key")
            return Tenant("acme", keys, TenantLimits(requests_per_minute=1, kv_blocks=1))

    async def use(nodes: Nodes, session: ClientSession, url: str) -> None:
        nodes.decode[0].status, nodes.decode[0].subscription.open = UP, True
        for headers in ({"Authorization": "Bearer a"}, {"Authorization": "Bearer a"}, {}):
            await session.post(f"{url}/v1/completions", data='{"prompt": [1], "max_tokens": 50}', headers=headers)

    keys = TenantKeys.of(b"k" * 32)
    with_front(use, tenants=Tenants())
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert told == [
        f"POST /v1/completions refused: 400 invalid_request, for the request; tenant {keys.pseudonym}; limit kv_blocks",
        "POST /v1/completions refused: 429 rate_limit_exceeded, for the request; "
        f"tenant {keys.pseudonym}; limit requests_per_minute",
        "POST /v1/completions refused: 401 invalid_api_key, for the request",
    ]


@pytest.mark.parametrize(("asked_s", "allowed_s"), [(None, 600.0), (5.0, 5.0), (10_000.0, 600.0)])
def test_a_request_waits_for_its_place_no_longer_than_it_may(asked_s, allowed_s, monkeypatch):
    """Its own timeout, within the router's."""
    clock, waited = ManualClock(), []

    class Handover:
        def __init__(self, *given):
            pass

        async def open(self, patience_s):
            waited.append(patience_s)
            clock.advance(patience_s)
            raise Overloaded("full")

        async def close(self):
            return

    class Store:
        async def lookup(self, span, lease):
            return Match()

    async def main() -> None:
        nodes = Nodes((), CONFIG.decode)
        nodes.decode[0].status, nodes.decode[0].subscription.open = UP, True
        monkeypatch.setattr(flow_module, "Handover", Handover)
        models = Models(nodes, own_defaults=False)
        models.add("place", TextSide(Tokenizer(byte_tokenizer()), NO_DEFAULTS))
        flow = Flow(CONFIG, nodes, models, Store(), Metrics(), clock)
        keys = TenantKeys.of(b"k" * 32)
        job = Job("r", nodes.decode[0].model, keys, "", [1, 2], SamplingParams(), timeout_s=asked_s)
        late = allowed_s - 3.0
        with pytest.raises(DeadlineExceeded, match="took longer than it may"):
            await anext(flow.run(job, Record("r", 2, clock.now() - late), Progress(job)))
        await nodes.close()

    asyncio.run(main())
    assert waited == [pytest.approx(3.0)]


def test_a_stream_goes_on_on_the_very_model_that_it_began_on(monkeypatch):
    """Not on one of the same name, however idle."""
    asked: list[int] = []
    clock = ManualClock()

    class Store:
        async def lookup(self, span, lease):
            return Match()

    class Handover:
        ended = False

        def __init__(self, sequence, placement, *given):
            self._node = placement.decode
            asked.append(nodes.decode.index(self._node))

        async def open(self, patience_s):
            return

        async def pieces(self, clock, give_up):
            yield Piece((5,))
            self._node.status = None
            raise Unavailable("the connection to the decode node broke")

        async def close(self):
            return

    async def main() -> None:
        nonlocal nodes
        config = dataclasses.replace(CONFIG, decode=("unix:/d0", "unix:/d1"), node_wait_s=0.05)
        nodes = Nodes((), config.decode)
        for node, status in zip(nodes.decode, (UP, another(fingerprint=b"o" * 32)), strict=True):
            node.status, node.subscription.open = status, True
        monkeypatch.setattr(flow_module, "Handover", Handover)
        models = Models(nodes, own_defaults=False)
        models.add("place", TextSide(Tokenizer(byte_tokenizer()), NO_DEFAULTS))
        flow = Flow(config, nodes, models, Store(), Metrics(), clock)
        keys = TenantKeys.of(b"k" * 32)
        job = Job("r", nodes.decode[0].model, keys, "", [1, 2], SamplingParams(max_tokens=9))
        nodes.decode[0].streams = 5  # the other one is the less loaded
        pieces = flow.run(job, Record("r", 2, clock.now()), Progress(job))
        assert (await anext(pieces)).token_ids == (5,)
        with pytest.raises(Unavailable, match="has become another model"):
            await anext(pieces)
        await nodes.close()

    nodes = None
    asyncio.run(main())
    assert asked == [0]


def test_waiting_for_a_worker_ends_with_the_clients_time():
    """And says that it was the client's; else that there is none."""

    async def main() -> None:
        clock = ManualClock()
        nodes = Nodes((), CONFIG.decode)
        flow = Flow(CONFIG, nodes, Models(nodes, own_defaults=False), None, Metrics(), clock)
        with pytest.raises(DeadlineExceeded):
            await flow.ready_model("name", clock.now())
        with pytest.raises(Unavailable, match="no decode node is ready; try again later"):
            await flow.ready_model("name", clock.now() + 100)
        await nodes.close()

    asyncio.run(main())


MADE_UP = "sk-my-secret 0123456789\n19:00:00 router INFO forged"


@pytest.mark.parametrize(
    ("path", "body", "about"),
    [
        ("completions", {"prompt": "a", MADE_UP: 1}, "an unknown field"),
        ("completions", {"prompt": "a", "stream": True, "stream_options": {MADE_UP: 1}}, "an unknown field"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a", MADE_UP: 1}]}, "an unknown field"),
        ("chat/completions", {"messages": [{"role": "user", "content": []}], MADE_UP * 99: 1}, "an unknown field"),
        ("chat/completions", {"messages": [{"role": 7}]}, "messages[0].role"),
        ("chat/completions", {"messages": [], "tools": [1]}, "tools"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature"),
        ("completions", {"prompt": "a", "stream": True, "stream_options": 1}, "stream_options"),
    ],
)
def test_names_that_a_client_makes_up_are_not_logged(path, body, about, caplog):
    """It is told of them; the log has those that we know."""
    caplog.set_level("DEBUG")

    async def use(nodes: Nodes, session: ClientSession, url: str) -> None:
        async with session.post(f"{url}/v1/{path}", data=json.dumps(body)) as answer:
            param = (await answer.json())["error"]["param"]
            assert MADE_UP[:20] in param if about == "an unknown field" else param == about

    with_front(use)
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(told) == 1
    assert f" refused: 400 invalid_request, for {about}; tenant " in told[0]
    assert not any(MADE_UP[:12] in record.getMessage() or "forged" in record.getMessage() for record in caplog.records)
