"""What probes and operators are told, on the clients' listener and on their own."""

import asyncio
from typing import Any

import pytest
from fronts import UP, House, another, with_house

from kvferry.common.proto import worker_pb2 as pb
from kvferry.router.admin import PAGES
from kvferry.router.models import WITHOUT_STORE
from kvferry.router.probes import NO_DIRECTORY, NO_PEERS, NO_STORE, STORE_S

NO_DECODE, NO_PREFILL = "decode node 1 of 1 is not ready", "prefill node 1 of 1 is not ready"


def test_ready_is_who_has_a_decode_worker():
    """The same on both listeners, of which the operators' tells addresses; and for SageMaker, which may also post."""

    async def use(house: House) -> None:
        (prefill,), (decode,) = house.nodes.prefill, house.nodes.decode
        for prefill.status, decode.status, decode.subscription.open, house.store.there, status, missing in (
            (None, None, False, True, 503, ["no decode node is ready", NO_PREFILL, NO_DECODE]),
            (UP, None, False, False, 503, ["no decode node is ready", NO_DECODE, NO_STORE]),
            (UP, UP, False, True, 503, ["no decode node is ready", NO_DECODE]),
            (None, UP, True, True, 200, ["no prefill node is ready for a decode node", NO_PREFILL]),
            (UP, UP, True, False, 200, [NO_STORE]),
            (UP, UP, True, True, 200, []),
        ):
            known = [
                told.replace("node 1 of 1", f"node at 127.0.0.1:{1 + told.startswith('decode')}") for told in missing
            ]
            for ask, missed in (
                (house.http.get(f"{house.api}/ready"), missing),
                (house.http.get(f"{house.admin}/ready"), known),
                (house.http.get(f"{house.api}/ping"), missing),
                (house.http.post(f"{house.api}/ping"), missing),
            ):
                async with ask as answer:
                    body = await answer.json()
                    assert answer.status == status
                    assert ("Retry-After" in answer.headers) == (status == 503)
                    assert body.get("missing", []) == missed
                    if status == 503:
                        assert body["error"]["message"] == "; ".join(missed)
                        assert body["error"]["code"] == "unavailable"
                    else:
                        assert body["status"] == ("degraded" if missed else "ready")
            async with house.http.get(f"{house.admin}/nodes") as answer:
                body = await answer.json()
                assert body["missing"] == known
                assert (body["store"] is None) == (not house.store.there)
        assert not [one for one in house.metrics.requests.collect()[0].samples if one.value], "probes are no requests"

    with_house(use)


def test_operators_see_workers_that_do_not_go_together():
    async def use(house: House) -> None:
        (prefill,), (decode,) = house.nodes.prefill, house.nodes.decode
        prefill.status, decode.status, decode.subscription.open = UP, another(fingerprint=b"o" * 32), True
        async with house.http.get(f"{house.admin}/nodes") as answer:
            told = await answer.json()
        assert told["conflicts"] == [
            "prefill 127.0.0.1:1 and decode 127.0.0.1:2 announce 'name' for different models: model fingerprint "
            "666666666666 against 6f6f6f6f6f6f"
        ]
        assert told["nodes"][1]["other_names"] == []

    with_house(use)


@pytest.mark.parametrize(
    ("differs", "kind", "told"),
    [
        ({"layout": pb.Layout(block_size=32)}, "and run it differently", "block_size 16 against 32"),
        ({"fingerprint": b"o" * 32}, "for different models", "model fingerprint 666666666666 against 6f6f6f6f6f6f"),
    ],
)
def test_why_prefill_and_decode_do_not_go_together(differs, kind, told):
    async def use(house: House) -> None:
        (prefill,), (decode,) = house.nodes.prefill, house.nodes.decode
        prefill.status, decode.status, decode.subscription.open = UP, another(**differs), True
        none = "no prefill node is ready for a decode node"
        for listener, p, d in (
            (house.api, "prefill node 1 of 1", "decode node 1 of 1"),
            (house.admin, "prefill node at 127.0.0.1:1", "decode node at 127.0.0.1:2"),
        ):
            body = await said(house, f"{listener}/ready")
            assert body == {"status": "degraded", "missing": [none, f"{d} has no use for the KV of {p}: {told}"]}
        (conflict,) = (await said(house, f"{house.admin}/nodes"))["conflicts"]
        assert conflict == f"prefill 127.0.0.1:1 and decode 127.0.0.1:2 announce 'name' {kind}: {told}"

    with_house(use)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_without_its_store_is_seen(role):
    async def use(house: House) -> None:
        (prefill,), (decode,) = house.nodes.prefill, house.nodes.decode
        prefill.status, decode.status, decode.subscription.open = UP, UP, True
        assert await said(house, f"{house.api}/ready") == {"status": "ready"}
        node = prefill if role == "prefill" else decode
        node.status = another(without_store=True)
        for listener, which in ((house.api, "1 of 1"), (house.admin, f"at {node.address}")):
            told = [f"{role} node {which} has no store: {WITHOUT_STORE[role]}"]
            assert await said(house, f"{listener}/ready") == {"status": "degraded", "missing": told}
        nodes = (await said(house, f"{house.admin}/nodes"))["nodes"]
        assert [one["address"] for one in nodes if one["without_store"]] == [node.address]
        async with house.http.get(f"{house.admin}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        for one in (prefill, decode):
            gauge = f'kvferry_node_without_store{{address="{one.address}",role="{one.role}"}} {float(one is node)}'
            assert gauge in lines

    with_house(use)


def test_what_the_store_is_not_connected_to_is_seen():
    async def use(house: House) -> None:
        (prefill,), (decode,) = house.nodes.prefill, house.nodes.decode
        prefill.status, decode.status, decode.subscription.open = UP, UP, True
        for house.store.directory, house.store.peers_away, missing, up in (
            ("none", 0, [], None),
            ("up", 0, [], 1.0),
            ("down", 0, [NO_DIRECTORY], 0.0),
            ("up", 1, [NO_PEERS.format("1 other store")], 1.0),
            ("down", 2, [NO_DIRECTORY, NO_PEERS.format("2 other stores")], 0.0),
        ):
            for listener in (house.api, house.admin):
                assert (await said(house, f"{listener}/ready")).get("missing", []) == missing
            told = await said(house, f"{house.admin}/nodes")
            assert told["missing"] == missing
            assert (told["store"]["directory"], told["store"]["peers_away"]) == (
                house.store.directory, house.store.peers_away)  # fmt: skip
            async with house.http.get(f"{house.admin}/metrics") as answer:
                lines = (await answer.text()).splitlines()
            shown = [line for line in lines if line.startswith("kvferry_store_directory_up ")]
            assert shown == ([] if up is None else [f"kvferry_store_directory_up {up}"])
            assert f"kvferry_store_peers_away {float(house.store.peers_away)}" in lines

    with_house(use)


def test_a_store_that_hangs_keeps_no_probe_waiting():
    async def use(house: House) -> None:
        (prefill,), (decode,) = house.nodes.prefill, house.nodes.decode
        prefill.status, decode.status, decode.subscription.open = UP, UP, True
        house.store.answers.clear()
        async with asyncio.timeout(4 * STORE_S):
            assert await said(house, f"{house.api}/ready") == {"status": "degraded", "missing": [NO_STORE]}

    with_house(use)


async def said(house: House, url: str) -> dict[str, Any]:
    async with house.http.get(url) as answer:
        return await answer.json()


def test_operators_find_their_pages():
    async def use(house: House) -> None:
        async with house.http.get(f"{house.admin}/") as answer:
            assert (await answer.json())["pages"] == PAGES
        for page in PAGES:
            async with house.http.get(house.admin + page) as answer:
                assert answer.status == (503 if page == "/ready" else 200)
        async with house.http.get(f"{house.admin}/health") as answer:
            assert await answer.json() == {"status": "ok"}
        async with house.http.get(f"{house.admin}/node") as answer:
            assert answer.status == 404
            assert (await answer.json())["error"]["message"] == "there is no /node here; / has what there is"
        async with house.http.post(f"{house.admin}/nodes") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET,HEAD")

    with_house(use)


@pytest.mark.parametrize("path", ["/health", "/ready", "/nowhere", "/v1/models", "/metrics"])
def test_an_answer_does_not_tell_who_wrote_the_libraries(path):
    async def use(house: House) -> None:
        for url in (house.api, house.admin):
            async with house.http.get(url + path) as answer:
                assert answer.headers["Server"] == "kvferry"

    with_house(use)


def test_a_counter_has_no_gauge_of_when_it_began():
    async def use(house: House) -> None:
        house.metrics.requests.labels("ok").inc()
        house.metrics.ttft.observe(1)
        async with house.http.get(f"{house.admin}/metrics") as answer:
            told = await answer.text()
        assert 'kvferry_requests_total{outcome="ok"} 1.0' in told
        assert "_created" not in told

    with_house(use)
