"""Starting, draining and ending the whole system."""

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from e2e.cluster import STOP_S, until
from e2e.test_faults import back


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "llama"), (signal.SIGTERM, "qwen2")])
def test_ctrl_c_with_streams_open(number, name, last_of, prompts):
    """Everything is gone within five seconds; the streams end, with an error or cut off, and do not hang."""
    cluster = last_of(name)
    assert cluster.ask(prompts.tokens(20)).cached == 0

    def read() -> str:
        try:
            with cluster.open(prompts.tokens(100), max_tokens=900) as stream:
                stream.read_tokens(1)
                started.append(True)
                stream.rest()
                return "finished" if stream.finished else "error"
        except httpx.TransportError:
            return "cut off"

    started: list[bool] = []
    with ThreadPoolExecutor(4) as threads:
        ends = [threads.submit(read) for _ in range(4)]
        until(lambda: len(started) == 4, 20, "streaming")
        cluster.stop(number)
        assert {end.result(STOP_S) for end in ends} <= {"finished", "error", "cut off"}


def test_serve_killed_takes_its_children_along(last_of, prompts):
    cluster = last_of("gpt2")
    cluster.ask(prompts.tokens(50))
    family = cluster.family()
    assert len(family) == 4
    cluster.process.kill()
    cluster.process.wait()
    _, alive = psutil.wait_procs(family, STOP_S)
    assert not alive
    shutil.rmtree(cluster.folder)  # nobody is left to do it


class TestDrain:
    @pytest.fixture
    @staticmethod
    def cluster(pairs):
        pairs.settle()
        return pairs

    @pytest.mark.parametrize("role", ["decode", "prefill"])
    def test_a_worker_drains_while_another_serves(self, role, cluster, oracle, prompts):
        prompt, failed_before = prompts.tokens(300), failed(cluster)
        with ThreadPoolExecutor(4) as threads:
            asked = threads.submit(cluster.ask, prompt, max_tokens=600, stream=True)

            def working() -> list[int]:
                told = [node for node in cluster.nodes()["nodes"] if node["role"] == role]
                return [number for number, node in enumerate(told) if node["streams"]]

            (busy,) = until(working, 10, "under way")
            process = cluster.of_role(role, busy)
            process.terminate()
            until(lambda: cluster.node(role, busy).get("draining", True), 2, "draining")
            others = [prompts.tokens(100) for _ in range(3)]
            replies = list(threads.map(cluster.ask, others))
            replies.append(asked.result())
        for tokens, reply in zip([*others, prompt], replies, strict=True):
            assert oracle.refuses(tokens, reply.token_ids) == ""
            assert reply.account["attempts"] == 1, "a request was moved, though its worker only drains"
        assert len(replies[-1].token_ids) == 600
        assert failed(cluster) == failed_before
        back(cluster, role, process.pid)

    def test_a_store_that_ends_fails_nobody(self, cluster, oracle, prompts):
        store, prompt = cluster.of_role("store"), prompts.tokens(300)
        with ThreadPoolExecutor(1) as thread:
            published = cluster.store()["published"]
            asked = thread.submit(cluster.ask, prompt)
            until(lambda: cluster.store()["published"] > published, 10, "publishing")
            store.terminate()
            reply = asked.result()
        assert oracle.refuses(prompt, reply.token_ids) == ""
        back(cluster, "store", store.pid)


def failed(cluster) -> str:
    """The counters of failed attempts that are not zero."""
    lines = cluster.admin("/metrics").text.splitlines()
    return "\n".join(line for line in lines if line.startswith("kvferry_failed_attempts_total") and line[-4:] != " 0.0")
