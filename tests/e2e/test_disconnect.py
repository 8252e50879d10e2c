"""A client that goes takes everything of its with it, within a second: blocks, leases, streams, tasks, descriptors."""

import json
import socket
import time
from itertools import product
from typing import Any

import psutil
import pytest
from e2e.cluster import Cluster, Prompts, credential, until

GONE_S = 1.0
STATUS_S = 1.1  # a worker tells its numbers at least once a second


@pytest.fixture
def cluster(slow) -> Cluster:
    return slow


def held(cluster: Cluster) -> dict[str, Any]:
    """What could leak, as far as the processes have told."""
    told = cluster.nodes()
    store = {name: told["store"][name] for name in ("leases", "writing", "reserved", "connections")}
    workers = {
        node["role"]: {name: node[name] for name in ("free_blocks", "streams", "tasks", "running", "waiting")}
        for node in told["nodes"]
    }
    return {"store": store, "router": told["router"], **workers}


def fds(cluster: Cluster) -> dict[str, int]:
    return {role: cluster.of_role(role).num_fds() for role in ("store", "prefill", "decode", "router")}


def send(cluster: Cluster, prompts: Prompts, length: int, **fields) -> socket.socket:
    """Send a request and read nothing."""
    body = json.dumps(cluster.body(prompts.tokens(length), **fields)).encode()
    lines = {"Host": "kvferry", "Content-Length": len(body), "Content-Type": "application/json"}
    head = "".join(f"{name}: {value}\r\n" for name, value in (lines | credential(cluster.key)).items())
    connection = socket.create_connection(("127.0.0.1", cluster.port))
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + body)
    return connection


def filling(cluster: Cluster) -> bool:
    """A prompt is half published, and decode waits for the rest."""
    return bool(cluster.store()["writing"] and cluster.node("decode")["running"])


def generating(cluster: Cluster) -> bool:
    """A fill is over and let go, its continue is under way."""
    return bool(not cluster.node("prefill")["streams"] and cluster.node("decode")["running"])


EVERY_WAY = list(product((1, 5), (filling, generating), ("stream", "whole")))
SOME_WAYS = [EVERY_WAY[at] for at in (0, 3, 5, 6)]  # any two of their values are met together


@pytest.mark.parametrize(
    ("clients", "during", "how"),
    [pytest.param(*way, marks=() if way in SOME_WAYS else pytest.mark.long) for way in EVERY_WAY],
)
def test_everything_is_given_back(clients, during, how, cluster, prompts):
    cluster.ask(prompts.tokens(300))  # whatever is made once is there
    cluster.settle()
    time.sleep(STATUS_S)  # the numbers are those of rest
    before, before_fds = held(cluster), fds(cluster)
    connections = [send(cluster, prompts, 150, max_tokens=600, stream=how == "stream") for _ in range(clients)]
    until(lambda: during(cluster), 20, during.__name__)
    busy = held(cluster)
    assert busy["decode"]["free_blocks"] < before["decode"]["free_blocks"]
    for connection in connections:
        connection.close()
    closed = time.monotonic()
    quick = ("free_blocks", "streams", "running", "waiting")

    def freed() -> bool:
        now = held(cluster)
        same = all(now[role][name] == before[role][name] for role in ("prefill", "decode") for name in quick)
        return same and now["store"] == before["store"]

    until(freed, GONE_S, "everything is free")
    until(lambda: fds(cluster) == before_fds, GONE_S, f"descriptors are {before_fds}")
    assert time.monotonic() - closed < 2 * GONE_S
    until(lambda: held(cluster) == before, STATUS_S + GONE_S, f"as before: {before}")


def test_a_stream_read_in_part(cluster, prompts, oracle):
    """The tokens until then were right, and so is what comes after."""
    cluster.settle()
    prompt = prompts.tokens(100)
    with cluster.open(prompt, max_tokens=800) as stream:
        stream.read_tokens(30)
    got = stream.reply.token_ids
    assert oracle.answer(prompt, 100).tokens[: len(got)] == got[:100]
    until(lambda: not cluster.busy(), GONE_S, "idle")
    reply = cluster.ask(prompt, max_tokens=100)
    assert oracle.refuses(prompt, reply.token_ids) == ""
    assert reply.cached >= 96


def test_a_reader_that_does_not_read(cluster, prompts):
    """It holds nobody up, and what waits for it is bounded and goes with it."""
    cluster.settle()
    slow = send(cluster, prompts, 100, max_tokens=800, stream=True)
    replies = [cluster.ask(prompts.tokens(100)) for _ in range(3)]
    assert all(len(reply.token_ids) == 24 for reply in replies)
    slow.close()
    until(lambda: not cluster.busy(), GONE_S, "idle")
    assert all(process.is_running() for process in cluster.family())
    assert psutil.Process(cluster.of_role("router").pid).is_running()
