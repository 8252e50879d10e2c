"""Processes that die or stop and bytes that change: slower, never wrong, and the hits come back."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from e2e.cluster import Cluster, until
from e2e.probe import Probe

LATE_S = 1.5  # several leases of 0.5 s


def back(cluster: Cluster, role: str, pid: int) -> None:
    """Wait until another process of the role is there and everybody has found it."""

    def there() -> bool:
        told = cluster.nodes()
        nodes = [node for node in told["nodes"] if node["role"] == role]
        connections = told["store"]["connections"] if told["store"] else 0
        stored = not any(node["without_store"] for node in told["nodes"] if node["ready"])
        return all(node["ready"] for node in nodes) and connections == 1 + len(told["nodes"]) and stored

    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 5, "dead")
    until(there, 30, f"{role} back")


class TestBadBytes:
    @pytest.mark.parametrize(("longer_by", "reused"), [(0, 128), (60, 144)], ids=["pulled by decode", "by prefill"])
    def test_a_flipped_byte(self, longer_by, reused, llama, oracle, prompts, probe_of: Callable[[Cluster], Probe]):
        probe, prompt = probe_of(llama), prompts.tokens(160)
        llama.ask(prompt)
        llama.flush(prompts)
        before = llama.store()
        probe.flip(probe.names(prompt)[5])
        longer = prompt + prompts.tokens(longer_by)
        reply = llama.ask(longer)
        assert oracle.refuses(longer, reply.token_ids) == ""
        assert reply.account["reused"] == {"gpu": 0, "host": reused}
        llama.settle()
        after = llama.store()
        assert after["bad_blocks"] - before["bad_blocks"] == 1
        assert after["quarantined"] - before["quarantined"] == 1
        assert all(probe.present(probe.names(longer))), "what was computed again was not published again"
        llama.flush(prompts)
        reply = llama.ask(longer)
        assert oracle.refuses(longer, reply.token_ids) == ""
        assert llama.store()["bad_blocks"] == after["bad_blocks"]

    def test_every_block_bad(self, llama, oracle, prompts, probe_of):
        probe, prompt = probe_of(llama), prompts.tokens(300)
        llama.ask(prompt)
        llama.flush(prompts)
        for name in probe.names(prompt):
            probe.flip(name)
        reply = llama.ask(prompt)
        assert oracle.refuses(prompt, reply.token_ids) == ""
        assert reply.cached == 0


class TestDeadWorkers:
    """One cluster whose processes are killed in turn."""

    @pytest.fixture
    @staticmethod
    def cluster(slow) -> Cluster:
        return slow

    def test_store_killed_while_idle(self, cluster, oracle, prompts):
        prompt, store = prompts.tokens(150), cluster.of_role("store")
        cluster.ask(prompt)
        cluster.settle()
        boot = cluster.store()["boot_id"]
        assert cluster.http.get("/ready").json() == {"status": "ready"}
        store.kill()
        lost = "the store node does not answer; until it is back, prompts are computed instead of found"
        until(lambda: lost in cluster.http.get("/ready").json().get("missing", []), 5, "told")
        assert cluster.http.get("/ready").status_code == 200
        until(lambda: all(node["without_store"] for node in cluster.nodes()["nodes"]), 5, "seen by every worker")
        told = cluster.http.get("/ready").json()["missing"]
        assert [one.partition(":")[0] for one in told] == [
            "prefill node 1 of 1 has no store", "decode node 1 of 1 has no store", lost]  # fmt: skip
        for asked in (prompt, prompts.tokens(150)):
            reply = cluster.ask(asked)
            assert oracle.refuses(asked, reply.token_ids) == ""
            assert reply.account["computed"]["prefill"] == reply.account["recomputed"] == 0, "it was computed twice"
        back(cluster, "store", store.pid)
        assert cluster.store()["boot_id"] != boot
        assert cluster.http.get("/ready").json() == {"status": "ready"}
        cluster.flush(prompts)
        after = [cluster.ask(prompt)]
        assert after[0].cached == 0, "a new store knows nothing of the old one's blocks"
        cluster.flush(prompts)
        after.append(cluster.ask(prompt))
        assert after[1].account["reused"] == {"gpu": 0, "host": 144}
        for reply in after:
            assert oracle.refuses(prompt, reply.token_ids) == ""

    def test_store_killed_in_a_long_prompt(self, cluster, oracle, prompts):
        prompt, store = prompts.tokens(800), cluster.of_role("store")
        cluster.settle()
        published = cluster.store()["published"]
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(cluster.ask, prompt)
            until(lambda: cluster.store()["published"] > published, 10, "partly published")
            store.kill()
            reply = asked.result()
        assert oracle.refuses(prompt, reply.token_ids) == ""
        assert reply.cached == 0
        back(cluster, "store", store.pid)
        cluster.flush(prompts)
        for _ in range(2):
            again = cluster.ask(prompt)
            assert oracle.refuses(prompt, again.token_ids) == ""
            cluster.flush(prompts)
        assert again.cached == 784

    @pytest.mark.parametrize(
        "known", [pytest.param(False, marks=pytest.mark.long, id="cold"), pytest.param(True, id="warm")]
    )
    def test_decode_killed_in_a_stream(self, known, cluster, oracle, prompts):
        prompt, decode = prompts.tokens(150), cluster.of_role("decode")
        if known:
            assert cluster.ask(prompt).cached == 0
        with cluster.open(prompt, max_tokens=600) as stream:
            stream.read_tokens(20)
            decode.kill()
            reply = stream.rest()
        assert stream.finished, reply.body
        assert len(reply.token_ids) == 600
        assert oracle.refuses(prompt, reply.token_ids) == ""
        assert reply.account["attempts"] == 2
        assert reply.cached == (144 if known else 0), "a failover changed the number of cached tokens"
        back(cluster, "decode", decode.pid)

    def test_decode_killed_before_it_has_the_blocks(self, cluster, oracle, prompts):
        """The fill, which is over but for its leases, is let go and cancelled in the same moment."""
        prompt, decode = prompts.tokens(100), cluster.of_role("decode")
        cluster.settle()
        published = cluster.store()["published"]
        with cluster.open(prompt, max_tokens=50) as stream:
            stream.read_tokens(1)
            decode.suspend()
            until(lambda: cluster.store()["published"] == published + 6, 10, "filled")
            assert cluster.store()["leases"], "decode was too quick"
            decode.kill()
            reply = stream.rest()
        assert oracle.refuses(prompt, reply.token_ids) == ""
        assert len(reply.token_ids) == 50
        assert reply.account["attempts"] == 2
        cluster.settle()
        back(cluster, "decode", decode.pid)


def test_prefill_killed_in_a_long_prompt(own, oracle, prompts):
    """It dies with its second chunk's slots granted; decode computes what is missing."""
    cluster = own("--prefill-arg=--failpoint=publish.granted=kill@2")
    prompt, prefill = prompts.tokens(800), cluster.of_role("prefill")
    reply = cluster.ask(prompt)
    assert oracle.refuses(prompt, reply.token_ids) == ""
    assert reply.cached == 0
    assert reply.account["attempts"] == 1
    assert reply.computed == 800
    assert 0 < reply.account["computed"]["prefill"] < 800
    assert reply.account["transferred"] == reply.account["computed"]["prefill"]
    until(lambda: not cluster.store()["reserved"] and not cluster.store()["writing"], 3, "given back")
    back(cluster, "prefill", prefill.pid)
    cluster.flush(prompts)
    again = cluster.ask(prompt)
    assert oracle.refuses(prompt, again.token_ids) == ""
    assert again.account["reused"] == {"gpu": 0, "host": 784}, "decode published what it computed"


@pytest.mark.long
def test_prefill_killed_with_another_there(own, oracle, prompts):
    """The other one takes what the first has published and fills the rest; that is no hit."""
    cluster = own("--prefill=2", "--prefill-arg=--failpoint=publish.granted=kill@3")
    prompt = prompts.tokens(250)  # four chunks, of which the first worker publishes two
    reply = cluster.ask(prompt)
    assert oracle.refuses(prompt, reply.token_ids) == ""
    assert reply.cached == 0
    assert reply.account["attempts"] == 1
    assert reply.computed == 250
    assert reply.account["computed"]["decode"] == 0
    assert 'kvferry_failed_attempts_total{role="prefill"} 1.0' in cluster.admin("/metrics").text


class TestStopped:
    @pytest.fixture
    @staticmethod
    def cluster(pairs) -> Cluster:
        return pairs

    def stop_publisher(self, cluster: Cluster) -> psutil.Process:
        """Stop the prefill worker that is writing, between its copy and its commit."""
        until(lambda: cluster.store()["writing"], 10, "writing")
        stopped = stop_busy(cluster, "prefill")
        assert cluster.store()["writing"]
        return stopped

    @pytest.mark.parametrize("alone", [True, pytest.param(False, marks=pytest.mark.long)])
    def test_it_comes_too_late(self, alone, cluster, oracle, prompts):
        """`alone`: nobody else asks for the same blocks, and may have published them, meanwhile."""
        prompt = prompts.tokens(200)
        cluster.settle()
        before = cluster.store()
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(cluster.ask, prompt)
            stopped = self.stop_publisher(cluster)
            try:
                other = threads.submit(cluster.ask, prompts.tokens(200) if alone else prompt)
                time.sleep(LATE_S)  # its leases lapse; that takes time and shows nowhere
            finally:
                stopped.send_signal(signal.SIGCONT)
            for reply in (first.result(), other.result()):
                assert oracle.refuses(reply.prompt_token_ids, reply.token_ids) == ""
        cluster.settle()
        after = cluster.store()
        refused = sum(after[how] - before[how] for how in ("late_commits", "already_there"))
        assert refused >= 4, "a commit that came too late was taken"
        assert not alone or after["late_commits"] - before["late_commits"] >= 4
        cluster.flush(prompts)
        reply = cluster.ask(prompt)
        assert oracle.refuses(prompt, reply.token_ids) == ""
        assert reply.account["reused"] == {"gpu": 0, "host": 192}
        assert cluster.store()["bad_blocks"] == before["bad_blocks"], "somebody read what a stopped publisher wrote"

    @pytest.mark.parametrize("role", ["prefill", "decode"])
    def test_one_that_stays_stopped_is_taken_for_dead(self, role, cluster, oracle, prompts):
        prompt = prompts.tokens(200)
        cluster.settle()
        with cluster.open(prompt, max_tokens=600) as stream:
            if role == "prefill":
                stopped = self.stop_publisher(cluster)
            else:
                stream.read_tokens(20)
                stopped = stop_busy(cluster, "decode")
            try:
                reply = stream.rest()
            finally:
                stopped.send_signal(signal.SIGCONT)
        assert stream.finished, reply.body
        assert oracle.refuses(prompt, reply.token_ids) == ""
        assert len(reply.token_ids) == 600
        assert reply.cached == 0


def stop_busy(cluster: Cluster, role: str) -> psutil.Process:
    """Stop the worker of a role that has a stream open."""
    told = [node for node in cluster.nodes()["nodes"] if node["role"] == role]
    (busy,) = [number for number, node in enumerate(told) if node["streams"]]
    process = cluster.of_role(role, busy)
    process.send_signal(signal.SIGSTOP)
    return process
