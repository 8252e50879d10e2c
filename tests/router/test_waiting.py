"""A request that comes before its worker waits for it, whether or not one has ever been there."""

import asyncio
import json
from dataclasses import replace

from fronts import CONFIG, UP, House, another, with_house

from kvferry.common.proto import worker_pb2 as pb

PATIENT = replace(CONFIG, prefill=(), decode=("unix:/d0", "unix:/d1"), node_wait_s=30.0)


async def come(house: House, number: int, status: pb.WorkerStatus | None) -> None:
    node = house.nodes.decode[number]
    node.status, node.subscription.open = status, status is not None
    await house.nodes.tell()


def asking(house: House, model: str | None, path: str = "/tokenize", **fields: object) -> asyncio.Task:
    async def ask() -> tuple[int, str | None, str]:
        body = {"prompt": "a"} | ({"model": model} if model else {}) | fields
        async with house.http.post(house.api + path, data=json.dumps(body)) as answer:
            return answer.status, answer.headers.get("Retry-After"), await answer.text()

    return asyncio.create_task(ask())


async def under_way(house: House, count: int) -> None:
    """Until so many requests wait."""
    async with asyncio.timeout(10):
        while house.front._gate.requests < count:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)


def test_the_first_worker_that_ever_comes_is_waited_for():
    async def use(house: House) -> None:
        named, nameless = asking(house, "name"), asking(house, None)
        await under_way(house, 2)
        await come(house, 0, UP)
        for task in (named, nameless):
            assert (await asyncio.wait_for(task, 10))[0] == 200

    with_house(use, PATIENT)


def test_a_model_whose_worker_has_not_come_yet_may_be_that_of_one_that_has_not():
    async def use(house: House) -> None:
        await come(house, 0, UP)
        waiting = asking(house, "blue")
        await under_way(house, 1)
        assert (await asyncio.wait_for(asking(house, "name"), 10))[0] == 200, "it has its worker"
        await come(house, 1, another(served_model_name="blue"))
        assert (await asyncio.wait_for(waiting, 10))[0] == 200
        await come(house, 1, None)
        assert (await asyncio.wait_for(asking(house, "green"), 10))[0] == 404, "all have said what they run"

    with_house(use, PATIENT)


def test_a_name_that_nobody_announced_is_told_so_once_all_have_come():
    async def use(house: House) -> None:
        waiting = asking(house, "green")
        await under_way(house, 1)
        await come(house, 0, UP)
        await come(house, 1, UP)
        status, _, text = await asyncio.wait_for(waiting, 10)
        assert (status, json.loads(text)["error"]["code"]) == (404, "model_not_found")

    with_house(use, PATIENT)


def test_after_the_wait_it_is_told_when_to_come_back():
    async def use(house: House) -> None:
        for path in ("/tokenize", "/v1/completions"):
            assert await asking(house, "name", path) == (503, "2", error("no decode node is ready; try again later"))
        await come(house, 0, UP)
        assert await asking(house, "blue") == (503, "2", error(
            "no worker has announced the model 'blue' yet, and 1 decode node of 2 did not come so far; try again later"
        ))  # fmt: skip
        await come(house, 0, None)
        assert await asking(house, "name") == (
            503, "2", error("no decode node is ready for name; try again later")
        )  # fmt: skip

    def error(message: str) -> str:
        told = {"message": message, "type": "server_error", "param": None, "code": "unavailable"}
        return json.dumps({"error": told}, separators=(",", ":"))

    with_house(use, replace(PATIENT, node_wait_s=0.05))


def test_it_waits_no_longer_than_the_client_has_time():
    async def use(house: House) -> None:
        status, retry_after, text = await asyncio.wait_for(asking(house, "name", "/v1/completions", timeout=0.2), 10)
        assert (status, retry_after, json.loads(text)["error"]["code"]) == (504, None, "timeout")

    with_house(use, PATIENT)


def test_who_waits_is_told_that_the_server_stops():
    async def use(house: House) -> None:
        waiting = asking(house, "name", "/v1/completions")
        await under_way(house, 1)
        await house.front.generator.drain()
        status, _, text = await asyncio.wait_for(waiting, 10)
        assert (status, "this server is shutting down" in text) == (503, True)

    with_house(use, replace(PATIENT, drain_s=0.05))
