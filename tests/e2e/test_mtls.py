"""Processes that know one another by certificates: who is let in, who is not and why, and certificates that change
while requests arrive and streams are open."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import grpc
import httpx
import pytest
from e2e.cluster import Reply, free_port, until
from e2e.conftest import TENANTS, TENANTS_FILE, track
from e2e.hosts import Hosts
from trust_folder import Folder

from kvferry.common import certs
from kvferry.common.certs import Leaf
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import PrefillStub

pytestmark = pytest.mark.long  # tests/router/test_trust.py says the same of parts in one process

LENGTHS = (10, 60, 150, 300)  # some are filled by prefill, some computed by decode itself
STREAM_TOKENS = 400


@pytest.fixture(scope="module")
def hosts(request, checkpoints, folder: Path, keys) -> Iterator[Hosts]:
    own = folder / "hosts"
    own.mkdir()
    cluster = track(request, Hosts(checkpoints["llama"], own, folder / TENANTS_FILE))
    cluster.key = keys[TENANTS[0]]
    yield cluster.start()
    cluster.stop()


def test_a_prompt_goes_through_both_workers(hosts, oracle, prompts):
    prompt = prompts.tokens(200)
    reply = hosts.ask(prompt)
    assert oracle.refuses(prompt, reply.token_ids) == ""
    assert reply.account["computed"]["prefill"] > 0
    assert {node["address"] for node in hosts.nodes()["nodes"]} == set(hosts.addresses.values())


class TestWhoIsLetIn:
    """At a worker that serves others meanwhile."""

    def call(self, hosts: Hosts, leaf: Leaf | None, roots: bytes, method: str, plain: bool = False) -> object:
        options = (("grpc.ssl_target_name_override", "prefill.kvferry"), ("grpc.use_local_subchannel_pool", 1))
        shown = (certs.key_to_pem(leaf.key), certs.to_pem([leaf.certificate])) if leaf else ()
        secret = grpc.ssl_channel_credentials(roots, *shown)
        address = hosts.addresses["prefill"]
        channel = grpc.insecure_channel(address) if plain else grpc.secure_channel(address, secret, options=options)
        with channel:
            stub = PrefillStub(channel)
            answers = stub.Watch(pb.WatchRequest()) if method == "Watch" else stub.Fill(iter([pb.FillCommand()]))
            return next(answers)

    def folder(self, hosts: Hosts) -> Folder:
        """The operator's CA."""
        (certificate,) = certs.from_pem((hosts.certs / "ca.pem").read_bytes())
        key = certs.key_from_pem((hosts.certs / "ca.key").read_bytes())
        return Folder(hosts.certs, "", certs.Authority(certificate, key))

    def test_a_doctor_watches_and_does_nothing_else(self, hosts):
        folder = self.folder(hosts)
        doctor, roots = folder.issue("doctor"), (hosts.certs / "ca.pem").read_bytes()
        assert self.call(hosts, doctor, roots, "Watch").role == "prefill"
        with pytest.raises(grpc.RpcError) as refused:
            self.call(hosts, doctor, roots, "Fill")
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert refused.value.details() == "the role doctor may not call Fill; router may"
        assert "is refused: the role doctor may not call Fill; router may" in hosts.log_of("prefill")

    @pytest.mark.parametrize("which", ["another worker", "expired", "other CA", "without", "plain"])
    def test_others_do_not_come_in(self, which, hosts):
        folder, roots = self.folder(hosts), (hosts.certs / "ca.pem").read_bytes()
        leaf = {
            "another worker": lambda: folder.issue("decode"),
            "expired": lambda: folder.issue("router", days=5, ago=9),
            "other CA": lambda: Folder(hosts.certs, "router").issue(),
        }.get(which, lambda: None)()
        with pytest.raises(grpc.RpcError) as refused:
            self.call(hosts, leaf, roots, "Watch", plain=which == "plain")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert self.call(hosts, folder.issue("router"), roots, "Watch").role == "prefill", "who may still can"

    @pytest.mark.long
    def test_a_router_that_took_one_for_the_other(self, hosts, keys):
        """It says so in its log, once, and to who asks whether it is ready."""
        crossed = {"prefill": hosts.addresses["decode"], "decode": hosts.addresses["prefill"]}
        port = free_port()
        hosts.run_router("crossed", port, free_port(), crossed)
        try:

            def told() -> str:
                try:
                    ready = httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5)
                except httpx.TransportError:
                    return ""
                assert ready.status_code == 503
                return ready.json()["error"]["message"] if ready.text.count("its certificate") >= 2 else ""

            said = until(told, 60, "the reasons")
            assert "decode node 1 of 1 is not ready: its certificate is that of prefill, not of decode" in said
            assert "prefill node 1 of 1 is not ready: its certificate is that of decode, not of prefill" in said
            time.sleep(5)  # two more looks
            log = hosts.log_of("crossed")
            for role, other in (("prefill", "decode"), ("decode", "prefill")):
                line = f"{role} node at {crossed[role]}: its certificate is that of {other}, not of {role}"
                assert log.count(line) == 1
        finally:
            hosts.end("crossed")


class Load:
    """Requests that arrive all the time, by several threads, with streams open beside them. Each answer is the right
    one, and none was tried twice."""

    def __init__(self, hosts: Hosts, oracle, prompts):
        self._hosts, self._oracle = hosts, oracle
        self._prompts = [prompts.tokens(length) for length in LENGTHS]
        for prompt in self._prompts:
            oracle.answer(prompt, 24)
        oracle.answer(self._prompts[-1], STREAM_TOKENS)
        self._salts = count()
        self._over = threading.Event()
        self.answers = 0

    def _ask(self, number: int) -> None:
        pick = random.Random(number)
        while not self._over.is_set():
            prompt = pick.choice(self._prompts)
            self._right(prompt, self._hosts.ask(prompt, cache_salt=f"salt {next(self._salts)}"))
            self.answers += 1

    def _right(self, prompt: list[int], reply: Reply) -> None:
        assert self._oracle.refuses(prompt, reply.token_ids) == ""
        assert reply.account["attempts"] == 1

    def _stream(self, opened: threading.Event) -> None:
        prompt = self._prompts[-1]
        with self._hosts.open(prompt, max_tokens=STREAM_TOKENS, cache_salt=f"salt {next(self._salts)}") as stream:
            stream.read_tokens(1)
            opened.set()
            reply = stream.rest()
        assert stream.finished, reply.body
        assert len(reply.token_ids) == STREAM_TOKENS
        self._right(prompt, reply)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Streams are opened before, and some requests answered; more of them come until it is over, and after."""
        self._over.clear()
        with ThreadPoolExecutor(4) as threads:
            opened = [threading.Event() for _ in range(2)]
            jobs = [threads.submit(self._stream, one) for one in opened]
            jobs += [threads.submit(self._ask, number) for number in range(2)]
            try:
                for one in opened:
                    until(lambda one=one: one.is_set() or failed(jobs), 30, "streams open")
                self._more(jobs)
                yield
                self._more(jobs)
            finally:
                self._over.set()
            for job in jobs:
                job.result(60)

    def _more(self, jobs: list[Future]) -> None:
        enough = self.answers + 3
        until(lambda: self.answers >= enough or failed(jobs), 60, "answers")


def failed(jobs: list[Future]) -> bool:
    """Whether a job has; why, is raised."""
    return any(job.result() is not None for job in jobs if job.done())


SWITCHED = "new calls go with the new certificates"


def rotate(hosts: Hosts, order: list[str], *flags: str) -> None:
    """One rotation, host by host. Afterwards the router's new calls go over new connections."""
    before = hosts.log_of("router").count(SWITCHED)
    hosts.manage("rotate", str(hosts.certs), *flags)
    for role in order:
        hosts.renew(role)
    until(lambda: hosts.log_of("router").count(SWITCHED) == before + 2, 20, "new connections")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="keys", marks=pytest.mark.long),
        pytest.param(("--ca",), id="a new CA", marks=pytest.mark.long),
        pytest.param(("--drop-old-ca",), id="the end of the old CA", marks=pytest.mark.long),
    ],
)
def test_a_rotation_under_load_loses_nothing(flags, hosts, oracle, prompts):
    order = ["router", "prefill", "decode"]
    random.Random(prompts.seed).shuffle(order)
    print(f"order: {order}")
    load = Load(hosts, oracle, prompts)
    with load.around():
        rotate(hosts, order, *flags)
    print(f"{load.answers} answers")
    lines = hosts.admin("/metrics").text.splitlines()
    attempts = [line for line in lines if line.startswith("kvferry_failed_attempts_total{")]
    assert all(line.endswith(" 0.0") for line in attempts), attempts
    for role in ("prefill", "decode"):
        until(lambda role=role: hosts.connections(role) == 1, 20, f"one connection to {role}")
