"""Keys, tenants and limits of a running system: the file changes under load, limits are exact, nothing secret is
logged."""

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from e2e.cluster import KVFERRY, Cluster, Stream, credential, until

from kvferry.common.block import BlockLayout
from kvferry.common.hashing import CacheScope
from kvferry.router.tenants import Tenants
from kvferry.router.tenants_file import TenantsFile, new_file, read_file, with_key, write_file

SOON_S = 2.0  # after so long a change of the file counts


class House:
    """A cluster whose tenants file the tests of this module change."""

    def __init__(self, cluster: Cluster, path: Path):
        self.cluster, self.path = cluster, path

    def make(self, tenant: str, **limits: Any) -> str:
        """A tenant's first key, once the router knows it."""
        file, key = with_key(read_file(self.path), tenant)
        self.write(limited(file, tenant, **limits))
        until(lambda: self.status(key) == 200, SOON_S, "known to the router")
        return key

    def write(self, file: TenantsFile) -> None:
        write_file(self.path, file)

    def kvferry(self, *arguments: str) -> str:
        return subprocess.check_output([*KVFERRY, *arguments, f"--tenants-file={self.path}"], text=True).strip()

    def status(self, key: str) -> int:
        return self.cluster.http.get("/v1/models", headers=credential(key)).status_code

    def post(self, key: str, prompt: list[int] | str, headers: dict[str, str] | None = None, **fields: Any):
        body = self.cluster.body(prompt, **fields)
        return self.cluster.http.post("/v1/completions", json=body, headers={**credential(key), **(headers or {})})

    @contextmanager
    def stream(self, key: str, prompt: list[int]) -> Iterator[Stream]:
        """A stream of 400 tokens that has begun."""
        body = self.cluster.body(prompt, stream=True, max_tokens=400)
        with self.cluster.stream("/v1/completions", body, key) as stream:
            stream.read_tokens(3)
            yield stream

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Nobody generates a token."""
        worker = self.cluster.of_role("decode")
        worker.suspend()
        try:
            yield
        finally:
            worker.resume()


def limited(file: TenantsFile, tenant: str, **limits: Any) -> TenantsFile:
    line = msgspec.structs.replace(file.tenants[tenant], limits=limits)
    return msgspec.structs.replace(file, tenants={**file.tenants, tenant: line})


@pytest.fixture(scope="module")
def house(own, folder: Path) -> House:
    path = folder / "changing.toml"
    write_file(path, with_key(new_file(), "first")[0])
    return House(own(f"--tenants-file={path}", "--log-level=DEBUG", tenants=False), path)


class Load:
    """Requests one after the other with each key, at the same time, from `with` to its end."""

    def __init__(self, house: House, prompt: list[int], *keys: str):
        self.house, self.prompt, self.keys = house, prompt, keys
        self.seen: dict[str, list[tuple[float, int]]] = {key: [] for key in keys}  # when sent, how answered
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(key,)) for key in keys for _ in range(3)]

    def _ask(self, key: str) -> None:
        with httpx.Client(base_url=self.house.cluster.url, timeout=30, headers=credential(key)) as http:
            while not self._stop.is_set():
                sent = time.monotonic()
                answer = http.post("/v1/completions", json=self.house.cluster.body(self.prompt, max_tokens=4))
                self.seen[key].append((sent, answer.status_code))

    def statuses(self, key: str, since: float = 0.0) -> set[int]:
        return {status for sent, status in self.seen[key] if sent >= since}

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        until(lambda: all(len(seen) > 5 for seen in self.seen.values()), 20, "under load")
        return self

    def __exit__(self, *ended: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


# -- a file that changes ----------------------------------------------------------------------------------------------


def test_a_key_is_made_and_revoked_under_load(house, prompts):
    stays, goes = house.make("load"), house.make("load")
    with Load(house, prompts.tokens(40), stays, goes) as load, house.stream(goes, prompts.tokens(20)) as stream:
        with house.standing_still():
            told = house.kvferry("keys", "revoke", goes.split("-")[1])
            revoked = time.monotonic()
            assert "is revoked; running routers refuse it within 2 s" in told
            until(lambda: house.status(goes) == 401, SOON_S, "refused")
        reply = stream.rest()
        assert stream.finished, "what it had under way is finished"
        assert len(reply.token_ids) == 400
        made = house.kvferry("keys", "create", "load", "--expires", "1h")
        until(lambda: house.status(made) == 200, SOON_S, "known")
        until(lambda: load.seen[goes][-1][0] > revoked + SOON_S + 0.5, 20, "long after")
    assert load.statuses(goes) == {200, 401}
    assert load.statuses(goes, revoked + SOON_S) == {401}
    assert load.statuses(stays) == {200}
    assert house.post(goes, [5]).json()["error"]["message"] == "the API key is not valid"


def test_a_tenant_is_erased_under_load(house, prompts):
    prompt, other = prompts.tokens(64), house.make("stays")
    key = house.make("goes")
    assert [house.post(key, prompt).json()["usage"]["kvferry"]["reused"]["gpu"] for _ in range(2)] == [0, 48]
    waiting: list[httpx.Response] = []
    with (
        Load(house, prompts.tokens(40), other) as load,
        house.stream(key, prompts.tokens(20)) as stream,
        house.standing_still(),
    ):
        whole = threading.Thread(target=lambda: waiting.append(house.post(key, prompt, max_tokens=300)))
        whole.start()
        five = "kvferry_open_requests 5.0"  # three of the load, and these two
        until(lambda: five in house.cluster.admin("/metrics").text, 5, "all under way")
        house.kvferry("tenants", "erase", "goes", "--yes")
        before = time.monotonic()
        reply = stream.rest()
        assert time.monotonic() - before < SOON_S + 1, "it ends while its worker stands still"
        assert not stream.finished
        assert (reply.error["type"], reply.error["code"]) == ("authentication_error", "invalid_api_key")
        assert reply.error["message"] == "the tenant of this API key was erased"
    whole.join()
    assert waiting[0].status_code == 401
    assert load.statuses(other) == {200}
    assert house.status(key) == 401
    again = house.make("goes")
    assert house.post(again, prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    house.cluster.settle()


def test_a_damaged_file_changes_nothing(house, prompts):
    key, text = house.make("safe"), house.path.read_text()
    begin = house.cluster.log.stat().st_size

    def told() -> str:
        return house.cluster.log.read_bytes()[begin:].decode()

    def told_of(faults: int) -> bool:
        return told().count("stay as they are") == faults

    def asked(times: int) -> bool:
        return len(load.seen[key]) >= times

    with Load(house, prompts.tokens(20), key) as load:
        for number, damaged in enumerate((text[: len(text) // 2], "cluster_secret = 7\n", ""), start=1):
            house.path.write_text(damaged)
            until(partial(told_of, number), SOON_S, "told of")
            until(partial(asked, len(load.seen[key]) + 5), 20, "asked for more")
        house.path.write_text(text)
        until(lambda: "the tenants file has changed" in told(), SOON_S, "read again")
    assert load.statuses(key) == {200}
    assert told().count("the tenants file") == 4, "each is told of once"


# -- limits -----------------------------------------------------------------------------------------------------------


def test_requests_a_minute(house):
    key = house.make("rpm", requests_per_minute=3)
    answers = [house.post(key, [5], max_tokens=1) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"3"}
    assert "x-ratelimit-limit-tokens" not in answers[0].headers
    refused = answers[-1]
    assert re.fullmatch(r"(\d+m)?[\d.]+s", refused.headers["x-ratelimit-reset-requests"])
    wait = int(refused.headers["Retry-After"])
    assert 1 <= wait <= 20
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_exceeded", "rate_limit_exceeded", None)
    assert error["message"] == f"this tenant's limit of 3 requests a minute is used up; try again in {wait} s"
    house.write(limited(read_file(house.path), "rpm"))
    until(lambda: house.post(key, [5], max_tokens=1).status_code == 200, SOON_S, "without a limit")


def test_whatever_costs_work_counts_as_a_request(house):
    key = house.make("counted", requests_per_minute=4)
    asks = [("/v1/models", None), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]}),
            ("/v1/completions", {"no": 1}), ("/v1/chat/completions", {}), ("/tokenize", {"prompt": "a"})]  # fmt: skip
    answers = [
        house.cluster.http.request("POST" if body is not None else "GET", path, json=body, headers=credential(key))
        for path, body in asks
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 400, 400, 429]
    left = [answer.headers.get("x-ratelimit-remaining-requests") for answer in answers]
    assert left == [None, "3", "2", "1", "0", "0"]


def test_requests_at_once(house, prompts):
    key = house.make("two", concurrent_requests=2)
    with house.stream(key, prompts.tokens(20)) as first, house.stream(key, prompts.tokens(20)) as second:
        with house.standing_still():
            refused = house.post(key, [5])
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            assert refused.json()["error"]["message"].startswith(
                "this tenant has 2 requests under way and its limit is 2 at once; try again"
            )
        first.rest()
        second.rest()
    until(lambda: house.post(key, [5], max_tokens=1).status_code == 200, SOON_S, "given back")
    statuses = house.cluster.together([lambda: house.post(key, prompts.tokens(30)).status_code] * 8)
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 2
    assert [house.post(key, [5], max_tokens=1).status_code for _ in range(3)] == [200] * 3


def test_tokens_a_minute(house, prompts):
    key = house.make("tpm", tokens_per_minute=120)  # two a second
    with house.cluster.stream("/v1/completions", house.cluster.body(prompts.tokens(60), stream=True), key) as stream:
        assert len(stream.rest().token_ids) == 24
    answer = house.post(key, prompts.tokens(60))
    assert answer.status_code == 429
    left = int(re.search(r"and this tenant has (\d+) left of its 120 tokens a minute", answer.text)[1])
    assert 120 - 60 - 24 <= left < 60
    assert answer.headers["x-ratelimit-limit-tokens"] == "120"
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) - left in (0, 1)
    assert int(answer.headers["Retry-After"]) in (-(-(60 - left) // 2), -(-(60 - left) // 2) - 1)
    never = house.post(key, prompts.tokens(121))
    assert never.status_code == 400
    assert "the request has 121 prompt tokens; this tenant's limit is 120 tokens a minute" in never.text


def test_prompts_and_blocks(house, prompts):
    key = house.make("small", prompt_tokens=50, kv_blocks=6)
    assert house.post(key, prompts.tokens(50), max_tokens=46).status_code == 200
    long, large = house.post(key, prompts.tokens(51)), house.post(key, prompts.tokens(50), max_tokens=47)
    assert (long.status_code, large.status_code) == (400, 400)
    assert "the prompt has 51 tokens; this tenant's limit is 50 a prompt" in long.text
    assert "the request may need 7 KV blocks for its prompt and max_tokens; this tenant's limit is 6" in large.text
    batch = house.post(key, [prompts.tokens(16), prompts.tokens(16)], max_tokens=16, n=2)
    assert batch.status_code == 200


def test_blocks_in_flight(house, prompts):
    key = house.make("held", kv_blocks=30)  # the stream may need 27
    with house.stream(key, prompts.tokens(20)), house.standing_still():
        refused = house.post(key, prompts.tokens(20), max_tokens=44)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert "may need 4 KV blocks for its prompt and max_tokens, and this tenant has 27 of its 30 in" in refused.text
    until(lambda: house.post(key, [5], max_tokens=400).status_code == 200, SOON_S, "given back")


def test_an_answer_without_max_tokens_is_as_long_as_the_blocks_allow(house, prompts):
    few, more = house.make("few", kv_blocks=2), house.make("more", kv_blocks=20)
    messages = [{"role": "user", "content": prompts.text(20)}]
    body = {"model": house.cluster.model.name, "messages": messages, "n": 2, "ignore_eos": True}
    answers = [
        house.cluster.http.post("/v1/chat/completions", json=body, headers=credential(key)) for key in (few, more)
    ]
    assert [answer.status_code for answer in answers] == [400, 200], "a block for each is less than the prompt"
    usage = answers[1].json()["usage"]
    assert usage["completion_tokens"] == 2 * (160 - usage["prompt_tokens"])


def test_what_a_client_says_of_tenants_is_dropped(house, prompts):
    """Neither headers nor fields make it another tenant, or have a say in its share."""
    first, second, prompt = house.make("one"), house.make("other"), prompts.tokens(64)
    house.post(first, prompt)
    names = ("X-Tenant", "X-Tenant-Id", "X-Kvferry-Tenant", "X-Forwarded-User", "OpenAI-Organization", "OpenAI-Project")
    answer = house.post(second, prompt, headers=dict.fromkeys(names, "one"), user="one")
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    for field in ("tenant", "weight"):
        assert house.post(second, prompt, **{field: "one"}).status_code == 400


@pytest.mark.long
def test_a_tenant_of_more_weight_goes_first_more_often(own, folder, prompts):
    """One place for all, and both have twelve requests for it: when the one that weighs eight times as much is done,
    the other has had some one or two."""
    path = folder / "weights.toml"
    file, light = with_key(new_file(), "light")
    file, heavy = with_key(file, "heavy")
    write_file(path, limited(limited(file, "light", weight=0.5), "heavy", weight=4))
    house = House(own(f"--tenants-file={path}", "--max-num-seqs=1", tenants=False), path)
    done: list[str] = []

    def ask(key: str) -> None:
        assert house.post(key, prompts.tokens(20)).status_code == 200
        done.append(key)

    with house.stream(heavy, prompts.tokens(20)) as first:  # so that all of them have to wait
        with house.standing_still():
            threads = [threading.Thread(target=ask, args=(key,)) for key in [light, heavy] * 12]
            for thread in threads:
                thread.start()
            until(lambda: "kvferry_open_requests 25.0" in house.cluster.admin("/metrics").text, 10, "all there")
        first.rest()
    for thread in threads:
        thread.join()
    assert len(done) == 24
    last = max(at for at, key in enumerate(done) if key == heavy)
    assert done[:last].count(light) <= 6, "twelve is what equal weights would give"
    house.cluster.stop()


# -- the log ----------------------------------------------------------------------------------------------------------


def test_nothing_secret_is_logged(house, prompts):
    """At DEBUG, and after all that the tests above have done."""
    key, other, text = house.make("logged"), house.make("broken"), prompts.text(200)
    house.post(key, text, cache_salt="a salt of the client", stop=["a stop of the client"])
    house.cluster.chat([{"role": "user", "content": text}], key=key)
    house.post(key, text, temperature=-1)
    house.post(key, text, no_such_field=text)
    house.cluster.http.post("/v1/completions", content=text, headers=credential(key))
    house.cluster.http.post(f"/v1/{key}", headers=credential(key))
    for wrong in (key[:-1] + "x", key[:-64] + other[-64:], key + "0"):
        assert house.post(wrong, text).status_code == 401
    file, good = read_file(house.path), house.path.read_text()
    house.path.write_text(good.replace('id = "', f'id = "{key}'))
    until(lambda: "the id of key number 1" in house.cluster.tail(20000), SOON_S, "told of")
    house.path.write_text(good)
    with house.stream(other, prompts.tokens(30)) as stream, house.standing_still():
        house.kvferry("tenants", "erase", "broken", "--yes")
        assert stream.rest().error["code"] == "invalid_api_key"
    house.cluster.settle()

    node, tenants = house.cluster.node("decode"), Tenants.of(file, None)
    scope = CacheScope(tenants["logged"].keys, bytes.fromhex(node["fingerprint"]), BlockLayout(**node["layout"]))
    names = scope.chain(list(text.encode()))
    chains = [tenants[name].keys.chain for name in file.tenants]
    secret = {file.cluster_secret, key[-64:], other[-64:], key, "a salt of the client", "a stop of the client"}
    secret |= {line.tenant_salt for line in file.tenants.values()} | {line.hmac for line in file.keys}
    secret |= {value.hex() for value in (*chains, *names)} | {repr(value)[2:-1] for value in (*chains, *names)}
    secret |= {text[at : at + 12] for at in range(0, 180, 12)}
    secret |= {str(list(text.encode()[at : at + 5]))[1:-1] for at in range(0, 190, 5)}
    log = house.cluster.log.read_text()
    assert log.count('"level": "debug"') > 0, "this is not all that could be logged"
    assert log.count(" refused: 401 ") >= 3
    assert [one for one in secret if one in log] == []
