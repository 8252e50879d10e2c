"""The front with several tenants: what one of them sends, or has under way, leaves room and time for the others."""

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fronts import CONFIG, UP, House, with_house

from kvferry.common.hashing import TenantKeys
from kvferry.router.quota import UNLIMITED
from kvferry.router.tenants import Tenant
from kvferry.router.text import SHORT_CHARS

KEYS = {name: TenantKeys.of(name[:1].encode() * 32) for name in ("acme", "bob")}
LOADED = {"prompt": "a" * 100, "max_tokens": 1}


class Tenants:
    """Whose a request is, the key says."""

    limits = dict.fromkeys(KEYS, UNLIMITED)
    pseudonyms = frozenset(keys.pseudonym for keys in KEYS.values())

    def authenticate(self, header: str) -> Tenant:
        return Tenant(name := header.removeprefix("Bearer "), KEYS[name])


async def post(house: House, tenant: str, body: bytes, path: str = "/v1/completions") -> tuple[int, dict]:
    headers = {"Authorization": f"Bearer {tenant}"}
    async with house.http.post(house.api + path, data=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def begun(house: House, tenant: str, path: str = "/v1/completions") -> asyncio.StreamWriter:
    """A request whose body does not come."""
    _, writer = await asyncio.open_connection(*house.api.removeprefix("http://").split(":"))
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {tenant}\r\nContent-Length: 10\r\n\r\n"
    writer.write(head.encode())
    await writer.drain()
    return writer


async def until(found: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while True:
            if found():
                return
            await asyncio.sleep(0.01)


async def under_way(house: House, requests: int) -> None:
    await until(lambda: house.front._gate.requests == requests)


def padded(size: int) -> bytes:
    body = json.dumps(LOADED)
    return body.encode() + b" " * (size - len(body))


def test_a_body_is_held_until_it_is_read_and_then_what_it_asks_for():
    """However much of it was nothing: a request that waits, or streams, holds its prompt."""

    async def use(house: House) -> None:
        gate, waiting = house.front._gate, []
        for number in (1, 2):
            waiting.append(asyncio.create_task(post(house, "acme", padded(900))))
            await until(lambda number=number: (gate.requests, gate.body_bytes) == (number, 400 * number))
        assert (await post(house, "bob", b"{" * 590))[0] == 400
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await under_way(house, 0)
        assert house.front._gate.body_bytes == 0

    with_house(use, replace(CONFIG, max_bodies_bytes=1400, node_wait_s=30.0), tenants=Tenants())


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
def test_a_tenant_leaves_places_for_others(path):
    async def use(house: House) -> None:
        house.front.take_tenants(Tenants())
        writers = [await begun(house, "acme", path) for _ in range(4)]
        await under_way(house, 4)
        status, answer = await post(house, "acme", b"{", path)
        assert (status, answer["error"]["code"]) == (503, "overloaded")
        assert answer["error"]["message"].startswith("this tenant has 4 requests under way, its share")
        assert (await post(house, "bob", b"{", path))[0] == 400
        for writer in writers:
            writer.close()
        await under_way(house, 0)
        house.front._gate.check_integrity()

    with_house(use, replace(CONFIG, max_concurrent=8), tenants=Tenants())


def test_who_is_alone_has_all_places():
    async def use(house: House) -> None:
        house.front.take_tenants(SimpleNamespace(limits={"acme": UNLIMITED}, pseudonyms=Tenants.pseudonyms))
        writers = [await begun(house, "acme") for _ in range(8)]
        await under_way(house, 8)
        for writer in writers:
            writer.close()
        await under_way(house, 0)

    with_house(use, replace(CONFIG, max_concurrent=8), tenants=Tenants())


@pytest.mark.parametrize("chars", [SHORT_CHARS - 1, SHORT_CHARS + 1])
def test_a_request_waits_for_a_tokenizer_no_longer_than_it_may(chars):
    """Its client's time is over, whoever else's work goes on."""
    go_on = threading.Event()

    async def use(house: House) -> None:
        house.nodes.decode[0].status, house.nodes.decode[0].subscription.open = UP, True
        tokenizer = house.models.side_of("place").tokenizer
        others = [asyncio.create_task(tokenizer.aside(chars, lambda: go_on.wait(60), "acme")) for _ in range(3)]
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(20):
                body = {"model": "name", "prompt": "a" * chars, "timeout": 0.2}
                status, answer = await post(house, "bob", json.dumps(body).encode())
                assert (status, answer["error"]["code"]) == (504, "timeout")
                body = {"model": "name", "prompt": "a" * chars}
                status, answer = await post(house, "bob", json.dumps(body).encode(), "/tokenize")
                assert (status, answer["error"]["code"]) == (504, "timeout")
        finally:
            go_on.set()
            await asyncio.gather(*others)

    with_house(use, replace(CONFIG, request_s=1.0), tenants=Tenants())


def test_large_bodies_of_tenants_are_read_in_turn():
    """However many of another's wait to be."""
    go_on, order = threading.Event(), []

    async def use(house: House) -> None:
        parsing = house.front._parsing
        taken = [asyncio.create_task(parsing.run("acme", lambda: go_on.wait(60))) for _ in range(8)]
        await asyncio.sleep(0)
        for task in taken[2:]:  # the threads are two
            task.add_done_callback(lambda _: order.append("acme"))
        asked = asyncio.create_task(post(house, "bob", b"{" * 70_000))
        await under_way(house, 1)
        await until(lambda: "bob" in parsing._waiting)
        go_on.set()
        assert (await asked)[0] == 400
        await asyncio.gather(*taken)
        assert len(order) == 6

    with_house(use, CONFIG, tenants=Tenants())
