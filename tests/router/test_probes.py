"""What probes and operators are told, on the clients' listener and on their own."""

import pytest
from fronts import UP, House, another, with_house

from kvferry.router.admin import PAGES
from kvferry.router.probes import NO_STORE

NO_DECODE, NO_PREFILL = "decode node 1 of 1 is not ready", "prefill node 1 of 1 is not ready"


def test_ready_is_who_has_a_decode_worker():
    """The same on both listeners; and for SageMaker, which may also post."""

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
            for ask in (
                house.http.get(f"{house.api}/ready"),
                house.http.get(f"{house.admin}/ready"),
                house.http.get(f"{house.api}/ping"),
                house.http.post(f"{house.api}/ping"),
            ):
                async with ask as answer:
                    body = await answer.json()
                    assert answer.status == status
                    assert ("Retry-After" in answer.headers) == (status == 503)
                    assert body.get("missing", []) == missing
                    if status == 503:
                        assert body["error"]["message"] == "; ".join(missing)
                        assert body["error"]["code"] == "unavailable"
                    else:
                        assert body["status"] == ("degraded" if missing else "ready")
            async with house.http.get(f"{house.admin}/nodes") as answer:
                body = await answer.json()
                assert body["missing"] == missing
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
