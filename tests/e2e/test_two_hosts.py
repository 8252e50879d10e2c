"""Prefill on one host, decode on another: right tokens over a real network, whatever becomes of it.

Where no namespaces can be made the hosts are addresses of loopback; what needs a cable to cut is left out there.
"""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from checkpoints import ARCHITECTURES
from e2e.capture import captured
from e2e.cases import CASES, Scene
from e2e.cluster import KVFERRY, Reply, until
from e2e.conftest import TENANTS_FILE, track
from e2e.netns import Loopback, network
from e2e.probe import Probe
from e2e.two_hosts import PREFILL, EveryStore, TwoHosts

from kvferry.common.hashing import TenantId
from kvferry.router.tenants import Tenants
from kvferry.router.tenants_file import read_file

SLOW_MBIT = 1.0
IN_TIME_S = 20.0  # a partition shows after 5 s
OTHERS = [pytest.param(arch, marks=pytest.mark.long) for arch in ARCHITECTURES if arch != "llama"]


@pytest.fixture(scope="module")
def start(request, checkpoints, folder: Path, keys) -> Iterator:
    """`start(arch, *hosts)`: a cluster on hosts of its own, or the one that runs there already."""
    running: dict[tuple[str, ...], TwoHosts] = {}
    with ExitStack() as stack:

        def started(arch: str, *names: str) -> TwoHosts:
            if (arch, *names) not in running:
                own = folder / "-".join(("hosts", arch, *names))
                own.mkdir()  # it is started once, whether that goes well or not
                shutil.copy2(folder / TENANTS_FILE, own)
                net = stack.enter_context(network(*names))
                cluster = track(request, TwoHosts(net, checkpoints[arch], own, own / TENANTS_FILE))
                stack.callback(cluster.kill)
                cluster.key = keys["acme"]
                running[arch, *names] = cluster.start()
            return running[arch, *names]

        yield started
        for cluster in running.values():
            cluster.stop()


@pytest.fixture
def two(start) -> Iterator[TwoHosts]:
    """Llama's, whom tests may harm, and leave as it was."""
    cluster = start("llama", "a", "b")
    yield cluster
    if cluster.net.can_cut:
        cluster.net.heal()


@pytest.fixture
def net(two) -> Loopback:
    if not two.net.can_cut:
        pytest.skip("no namespaces can be made here, so there is no cable to cut")
    return two.net


def asked_meanwhile(two: TwoHosts, prompt: list[int], happens) -> tuple[Reply, float]:
    """The answer to a prompt while whose blocks are on their way to b something happens; and how long it took."""
    brought, began = two.stats("b").brought, time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(two.ask, prompt)
        until(lambda: two.stats("b").brought > brought or two.stats("b").writing, 10, "blocks on their way")
        assert not asked.done()
        happens()
        return asked.result(), time.monotonic() - began


def travels_again(two: TwoHosts, oracle, prompts) -> None:
    """A new prompt is computed on a, and its blocks come from there."""
    two.settle()
    prompt, brought = prompts.tokens(100), two.stats("b").brought

    def travelled() -> bool:
        reply = two.ask(prompts.tokens(16) + prompt)
        assert oracle.refuses(reply.prompt_token_ids, reply.token_ids) == ""
        return two.stats("b").brought > brought and bool(reply.account["transferred"])

    until(travelled, 30, "blocks travel again")


# -- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ["llama", *OTHERS])
def test_tokens_are_those_of_the_reference(arch, case, start, oracles, prompts):
    two = start(arch, "a", "b")
    scene = Scene(two, prompts, EveryStore(two))
    CASES[case](scene)
    assert scene.replies
    for reply in scene.replies:
        assert oracles[arch].refuses(reply.prompt_token_ids, reply.token_ids) == ""
    two.settle()


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_with_the_router_on_a_host_of_its_own(case, start, oracle, prompts):
    three = start("llama", "a", "b", "c")
    scene = Scene(three, prompts, EveryStore(three))
    CASES[case](scene)
    for reply in scene.replies:
        assert oracle.refuses(reply.prompt_token_ids, reply.token_ids) == ""


def test_blocks_travel(two, oracle, prompts):
    """What b has of a prompt that a computed came from a: whole, streamed, for several answers."""
    prompt, before = prompts.tokens(300), {name: two.stats(name) for name in "ab"}
    pulled = two.node("decode")["pulled_bytes"]
    with two.open(prompt) as stream:
        streamed = stream.rest()
    assert stream.finished
    assert oracle.refuses(prompt, streamed.token_ids) == ""
    assert streamed.account["computed"] == {"prefill": 300, "decode": 0}
    assert streamed.account["transferred"] == 288
    two.settle()
    after = {name: two.stats(name) for name in "ab"}
    assert after["b"].brought - before["b"].brought == 18
    assert after["a"].sent - before["a"].sent == 18
    assert until(lambda: two.node("decode")["pulled_bytes"] > pulled, 5, "told") is True
    several = two.ask(prompts.tokens(200), n=3)
    assert several.account["transferred"] == 192
    assert len(several.body["choices"]) == 3
    for choice in several.body["choices"]:
        assert oracle.refuses(several.body["choices"][0]["prompt_token_ids"], choice["token_ids"]) == ""


def test_what_a_computed_is_a_hit_on_b(two, oracle, prompts, keys):
    """For the same tenant, from a's store, which Redis tells of: b's has been started anew."""
    prompt = prompts.tokens(130)
    two.ask(prompt)
    two.settle()
    two.kill_one("store b")
    two.run_store_again("b")
    two.flush(prompts)
    names = EveryStore(two).names(prompt)
    assert Probe(two.of(two.a), two.tenants_file).present(names) == [True] * 8
    before = two.stats("b")
    other = two.ask(prompt, key=keys["beta"])
    assert other.cached == 0
    two.settle()
    assert other.account["reused"] == {"gpu": 0, "host": 0}
    middle = two.stats("b")
    reply = two.ask(prompt)
    assert reply.account["reused"] == {"gpu": 0, "host": 128}
    two.settle()
    assert two.stats("b").brought - middle.brought == 8
    assert middle.brought - before.brought == 8, "the other tenant's own blocks"
    for one in (other, reply):
        assert oracle.refuses(prompt, one.token_ids) == ""


# -- a network that fails ---------------------------------------------------------------------------------------------


def test_a_cut_while_blocks_are_on_their_way(two, net, oracle, prompts):
    prompt = prompts.tokens(800)
    net.slow(two.a, SLOW_MBIT)
    reply, seconds = asked_meanwhile(two, prompt, lambda: net.cut(two.a, two.b))
    assert oracle.refuses(prompt, reply.token_ids) == ""
    assert seconds < IN_TIME_S
    lonely = prompts.tokens(300)
    assert oracle.refuses(lonely, two.ask(lonely).token_ids) == "", "b goes on alone"
    net.heal()
    travels_again(two, oracle, prompts)


@pytest.mark.long
def test_a_cut_before_a_prompt_is_sent(two, net, oracle, prompts):
    """The router still takes prefill for there."""
    net.cut(two.a, two.b)
    prompt, began = prompts.tokens(300), time.monotonic()
    reply = two.ask(prompt)
    assert time.monotonic() - began < IN_TIME_S
    assert oracle.refuses(prompt, reply.token_ids) == ""
    assert reply.account["computed"] == {"prefill": 0, "decode": 300}
    net.heal()
    travels_again(two, oracle, prompts)


@pytest.mark.long
def test_a_slow_link(two, net, oracle, prompts):
    """What does not come in time is computed."""
    net.slow(two.a, SLOW_MBIT / 4)
    for length in (100, 400, 800):
        prompt, began = prompts.tokens(length), time.monotonic()
        assert oracle.refuses(prompt, two.ask(prompt).token_ids) == ""
        assert time.monotonic() - began < IN_TIME_S
    net.heal()
    travels_again(two, oracle, prompts)


@pytest.mark.long
def test_a_cut_between_router_and_decode_in_mid_stream(start, oracle, prompts):
    """The stream waits, and goes on where it was: no token twice, none lost."""
    three = start("llama", "a", "b", "c")
    if not three.net.can_cut:
        pytest.skip("no namespaces can be made here, so there is no cable to cut")
    prompt = prompts.tokens(100)
    try:
        with three.open(prompt, max_tokens=600) as stream:
            stream.read_tokens(5)
            three.net.cut(three.front, three.b)
            until(lambda: not three.node("decode")["ready"], 15, "the cut noticed")
            three.net.heal()
            reply = stream.rest()
    finally:
        three.net.heal()
    assert stream.finished
    assert reply.account["attempts"] == 2
    assert oracle.refuses(prompt, reply.token_ids) == ""
    assert len(reply.token_ids) == 600


# -- processes that fail ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_store_of_a_killed_while_it_sends(two, net, oracle, prompts):
    prompt = prompts.tokens(800)
    net.slow(two.a, SLOW_MBIT)
    reply, seconds = asked_meanwhile(two, prompt, lambda: two.kill_one("store a"))
    net.heal()
    assert oracle.refuses(prompt, reply.token_ids) == ""
    assert seconds < IN_TIME_S
    without = prompts.tokens(200)
    assert oracle.refuses(without, two.ask(without).token_ids) == ""
    two.run_store_again("a")
    travels_again(two, oracle, prompts)


@pytest.mark.parametrize("how", [pytest.param("killed", marks=pytest.mark.long), "paused"])
def test_redis_fails(how, two, oracle, prompts):
    """Blocks still travel from where they were just computed; that others have a prefix, nobody hears."""
    known = prompts.tokens(150)
    two.ask(known)
    two.settle()
    with two.killed_redis() if how == "killed" else two.stopped("redis"):
        for prompt in (*(prompts.tokens(length) for length in (40, 150, 300)), known):
            began = time.monotonic()
            reply = two.ask(prompt)
            assert time.monotonic() - began < IN_TIME_S / 2
            assert oracle.refuses(prompt, reply.token_ids) == ""
        assert reply.cached == 144, "b has these blocks itself"

    def told_of() -> bool:
        """What decode computes and b keeps, prefill finds by Redis in the next turn."""
        first = two.ask(prompts.tokens(20), max_tokens=60)
        two.settle()
        before = first.prompt_token_ids + first.token_ids
        turn = two.ask(before + prompts.tokens(60))
        assert oracle.refuses(turn.prompt_token_ids, turn.token_ids) == ""
        return two.stats("a").brought > brought

    brought = two.stats("a").brought
    until(told_of, 30, "Redis tells of blocks again")


# -- what others see --------------------------------------------------------------------------------------------------


def test_a_plain_listener_beyond_loopback_is_refused(two):
    """A worker that other hosts reach needs certificates: tenants' keys come to it."""
    listen = "198.18.0.1:7710" if not two.net.can_cut else f"{two.a.address}:{PREFILL + 1}"
    flags = [f"--listen={listen}", f"--store={two.folder_of(two.a)}/store", "--log-format=text"]
    told = subprocess.run(
        [*two.a.inside, *KVFERRY, "prefill", str(two.model), *flags],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert told.returncode == 2
    assert told.stderr == (
        f"kvferry prefill: {listen} can be reached from other hosts, and tenant keys would cross the network in the "
        "clear; give --certs DIR, which `kvferry certs init DIR` makes, or use unix:/path or a loopback address\n"
    )


def test_nothing_readable_passes_the_network(two, oracle, prompts, keys, folder):
    """Of a marked prompt: neither its KV, nor its tokens, nor the keys of its tenant, between the hosts. That the
    capture would show them is seen by what does pass: the sealed blocks, and, from the client, prompt and API key."""
    prompt = prompts.tokens(300)
    if two.relays is None:
        with captured(two.b, folder / "packets") as capture:
            reply = two.ask(prompt)
            two.settle()
        hosts = b"\0".join(capture.between(two.a.address, two.b.address))
        clients = b"\0".join(capture.streams.values())
    else:
        reply = two.ask(prompt)
        two.settle()
        hosts = clients = b"\0".join(map(bytes, two.relays.streams))
    assert oracle.refuses(prompt, reply.token_ids) == ""
    assert reply.account["transferred"] == 288
    keys_of = Tenants.load(two.tenants_file)[TenantId("acme")].keys
    plain, sealed = EveryStore(two).bytes_of(prompt, keys_of.seal)
    assert len(plain) == len(sealed) == 18
    assert all(block in hosts for block in sealed), "the capture has not seen the blocks pass"
    told = json.dumps(prompt, separators=(",", ":")).encode()
    if two.relays is None:
        assert keys["acme"].encode() in clients
        assert told in clients
    store_secret = (two.certs_of(two.a) / "store.secret").read_bytes().strip()
    hidden = {
        "chain": keys_of.chain,
        "seal": keys_of.seal,
        "cluster": bytes.fromhex(read_file(two.tenants_file).cluster_secret),
        "stores": bytes.fromhex(store_secret.decode()),
    }
    for what, key in hidden.items():
        for form in (key, key.hex().encode(), base64.b64encode(key)):
            assert form not in clients, f"the {what} key passed in the clear"
    token_ids = b"".join(token.to_bytes(4, "little") for token in prompt[:16])
    readable = {"API key": keys["acme"].encode(), "prompt": told, "tokens": bytes(prompt[:32]), "token ids": token_ids}
    for what, form in readable.items():
        assert form not in hosts, f"the {what} passed between the hosts"
    for block in plain:
        for start in range(0, len(block) - 16, 16):
            assert block[start : start + 16] not in hosts, "KV passed in the clear"


def test_an_erased_tenant_is_gone_from_both_hosts(two, oracle, prompts, keys):
    kept, own = prompts.tokens(150), prompts.tokens(150)
    two.ask(kept)
    two.ask(own, key=keys["beta"])
    two.settle()
    acme, beta = two.pseudonym("acme"), two.pseudonym("beta")
    before = {name: two.stats(name).committed_by_tenant for name in "ab"}
    assert all(counts[beta] >= 9 and counts[acme] >= 9 for counts in before.values())
    body = two.body(prompts.tokens(100), stream=True, max_tokens=600)
    with two.stream("/v1/completions", body, keys["beta"]) as stream:
        stream.read_tokens(3)
        assert stream.reply.status == 200
        with two.stopped("decode"):  # so that it is not done before
            erase = [*KVFERRY, "tenants", "erase", "beta", f"--tenants-file={two.tenants_file}", "--yes"]
            subprocess.run(erase, check=True, capture_output=True)
            reply = stream.rest()
    assert (reply.error["type"], reply.error["message"]) == (
        "authentication_error", "the tenant of this API key was erased")  # fmt: skip
    until(lambda: not any(beta in two.stats(name).committed_by_tenant for name in "ab"), 5, "beta's blocks gone")
    for role in ("prefill", "decode"):
        until(lambda role=role: f"tenant {beta} was erased" in two.log_of(role), 5, "told")
        (line,) = [line for line in two.log_of(role).splitlines() if f"tenant {beta} was erased" in line]
        assert int(line.partition("was erased: ")[2].split()[0]) >= 9, line
    two.settle()
    time.sleep(0.5)  # what was on its way has come by now
    for name in "ab":
        after = two.stats(name).committed_by_tenant
        assert beta not in after
        assert after[acme] >= before[name][acme]
    again = two.ask(kept)
    assert again.account["reused"] == {"gpu": 144, "host": 0}
    assert oracle.refuses(kept, again.token_ids) == ""
    refused = two.post("/v1/completions", two.body(own), keys["beta"])
    assert refused.status == 401
