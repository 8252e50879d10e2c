"""A router and its workers over real TLS: whom it speaks to, what it says of the others, and what happens to calls when
certificates change. The workers answer by a script; their certificates, and what they check, are the real ones."""

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
from trust_folder import Folder

from kvferry.common import certs, credentials
from kvferry.common.clock import ManualClock
from kvferry.common.credentials import LiveCredentials
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto import worker_pb2_grpc as rpc
from kvferry.decode.subscriber import Subscriber
from kvferry.engine.callers import OnlyRoles, server_credentials
from kvferry.router import nodes as nodes_module
from kvferry.router.models import Models
from kvferry.router.nodes import Node, Nodes

PATIENCE_S = 20.0
STATUS = pb.WorkerStatus(served_model_name="m", layout=pb.Layout(block_size=16, dtype="float32"))

Live = LiveCredentials | None


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Looks more often than it would, so that what is told once could be told many times."""
    monkeypatch.setattr(nodes_module, "REFUSED_S", 0.05)
    monkeypatch.setattr(credentials, "LOOK_EVERY_S", 0.05)


class Worker(rpc.PrefillServicer, rpc.DecodeServicer):
    """Is there. A fill goes on until its caller ends it."""

    def __init__(self, live: Live = None):
        self.live = live
        self.watched = 0

    async def Watch(self, request, context):
        self.watched += 1
        while True:
            yield STATUS
            await asyncio.sleep(0.2)

    async def Subscribe(self, subscription, context):
        async for message in Subscriber().messages():
            yield message

    async def Fill(self, commands, context):
        async for _ in commands:
            yield pb.FillReport(started=True)
        yield pb.FillReport(done=True)


@asynccontextmanager
async def serving(role: str, live: Live) -> AsyncIterator[tuple[Worker, str]]:
    """A worker on loopback, without certificates if it has no `live`, and its address."""
    worker, server = Worker(live), grpc.aio.server(interceptors=(OnlyRoles(),) if live else ())
    register = rpc.add_PrefillServicer_to_server if role == "prefill" else rpc.add_DecodeServicer_to_server
    register(worker, server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, server_credentials(live)) if live else server.add_insecure_port(address)
    await server.start()
    looking = asyncio.create_task(live.watch()) if live else None
    try:
        yield worker, f"127.0.0.1:{port}"
    finally:
        if looking:
            looking.cancel()
        await server.stop(None)


def with_node(use: Callable[[Nodes, Node, Worker], Awaitable[None]], role: str, servers: Live, routers: Live) -> None:
    """A router's view of one worker, which it takes for one of `role`. Nothing is left of it afterwards."""

    async def main() -> None:
        async with serving(role, servers) as (worker, address):
            nodes = Nodes(*(((address,), ()) if role == "prefill" else ((), (address,))), routers)
            nodes.start()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await use(nodes, nodes.all[0], worker)
            finally:
                await nodes.close()
        assert not connections(nodes.all[0])

    asyncio.run(main())


def connections(node: Node) -> list[object]:
    """Those from here to a worker, as the system has them."""
    port = int(node.address.rpartition(":")[2])
    open_now = psutil.Process().net_connections("tcp")
    return [one for one in open_now if one.raddr and one.raddr.port == port and one.status == "ESTABLISHED"]


async def until(found: Callable[[], object]) -> None:
    while not found():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@pytest.fixture
def hosts(tmp_path: Path) -> dict[str, Folder]:
    """What the hosts of each role have, under one CA."""
    ca = certs.new_authority(datetime.now(UTC))
    return {role: Folder(tmp_path / role, role, ca).fill() for role in ("router", "prefill", "decode")}


def live(folder: Folder) -> LiveCredentials:
    return LiveCredentials(folder.path, folder.role)


async def comes_up(nodes: Nodes, node: Node, worker: Worker) -> None:
    await until(lambda: node.ready)
    assert node.problem == ""


class TestWhoSpeaks:
    @pytest.mark.parametrize("role", ["prefill", "decode"])
    def test_who_has_certificates_with_who_has(self, role, hosts):
        with_node(comes_up, role, live(hosts[role]), live(hosts["router"]))

    @pytest.mark.parametrize("role", ["prefill", "decode"])
    def test_loopback_needs_none(self, role):
        with_node(comes_up, role, None, None)

    def test_a_unix_socket_needs_none_although_there_are_some(self, hosts, tmp_path):
        async def main() -> None:
            server = grpc.aio.server()
            rpc.add_PrefillServicer_to_server(Worker(), server)
            server.add_insecure_port(f"unix:{tmp_path}/s")
            await server.start()
            nodes = Nodes((f"unix:{tmp_path}/s",), (), live(hosts["router"]))
            nodes.start()
            assert await nodes.wait_for(lambda: nodes.all[0].ready, PATIENCE_S)
            await nodes.close()
            await server.stop(None)

        asyncio.run(main())

    @pytest.mark.parametrize("secure", [True, False])
    def test_a_tenants_key_on_the_wire(self, secure, hosts):
        """Somebody between router and worker sees it without certificates, which is why that is for loopback alone."""
        key, seen = secrets.token_bytes(32), bytearray()
        print(f"key {key.hex()}")

        async def main() -> None:
            async with serving("prefill", live(hosts["prefill"]) if secure else None) as (_, address):
                relay = await asyncio.start_server(partial(forward, seen, address), "127.0.0.1", 0)
                port = relay.sockets[0].getsockname()[1]
                nodes = Nodes((f"127.0.0.1:{port}",), (), live(hosts["router"]) if secure else None)
                nodes.start()
                (node,) = nodes.all
                assert await nodes.wait_for(lambda: node.ready, PATIENCE_S)
                fill = node.stub.Fill()
                await fill.write(pb.FillCommand(open=pb.Sequence(chain_key=key)))
                assert (await fill.read()).started
                await nodes.close()
                relay.close()

        asyncio.run(main())
        assert len(seen) > 500
        assert (key in seen) == (not secure)

    @pytest.mark.parametrize("secure", [True, False])
    def test_no_proxy_comes_in_between(self, secure, hosts, monkeypatch):
        """It would see what goes to a loopback address as it is."""
        with socket.create_server(("127.0.0.1", 0)) as proxy:
            proxy.setblocking(False)
            for name in ("grpc_proxy", "https_proxy", "http_proxy"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
            for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
                monkeypatch.delenv(name, raising=False)
            routers, servers = (live(hosts["router"]), live(hosts["prefill"])) if secure else (None, None)
            with_node(comes_up, "prefill", servers, routers)
            with pytest.raises(BlockingIOError):
                proxy.accept()


async def forward(seen: bytearray, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What comes by one connection, and what is answered; `seen` is all of it."""
    host, _, port = address.rpartition(":")
    answers, asked = await asyncio.open_connection(host, int(port))

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(2**16):
            seen.extend(data)
            target.write(data)
            await target.drain()
        target.close()

    await asyncio.gather(pass_on(reader, asked), pass_on(answers, writer), return_exceptions=True)


def expired(folder: Folder) -> LiveCredentials:
    """Of a process that takes its certificate for valid still."""
    folder.put(folder.issue(days=60, ago=90))
    return LiveCredentials(folder.path, folder.role, ManualClock((datetime.now(UTC) - timedelta(days=90)).timestamp()))


def of_another_ca(folder: Folder) -> LiveCredentials:
    return live(Folder(folder.path, folder.role).fill())


def of_another_ca_that_trusts_ours(folder: Folder) -> LiveCredentials:
    other = Folder(folder.path, folder.role).fill()
    other.trust(other.ca, folder.ca)
    return live(other)


def of_another_role(folder: Folder) -> LiveCredentials:
    return live(Folder(folder.path, "decode", folder.ca).fill())


def none(folder: Folder) -> None:
    return None


REFUSED = {
    "server expired": (expired, live, "its certificate has expired; run `kvferry certs rotate` and copy the new files"),
    "server of another CA": (of_another_ca, live, "its certificate is not from a CA of our ca.pem"),
    "server of another role": (of_another_role, live, "its certificate is that of decode, not of prefill"),
    "server without": (none, live, "it answers without certificates; start it with --certs, too"),
    "router expired": (live, expired, "it refuses our certificate, which expired at "),
    "router of another CA": (
        live,
        of_another_ca_that_trusts_ours,
        "it refuses our certificate; perhaps its ca.pem ",
    ),
    "router without": (live, none, "it wants certificates; start this one with --certs, too"),
}


class TestWhoDoesNot:
    @pytest.mark.parametrize("case", REFUSED)
    def test_why_is_told_once(self, case, hosts, caplog):
        servers, routers, says = REFUSED[case]

        async def use(nodes: Nodes, node: Node, worker: Worker) -> None:
            await until(lambda: node.problem)
            await asyncio.sleep(1.0)  # some twenty looks
            assert node.problem.startswith(says)
            assert not node.ready
            assert worker.watched == 0
            models = Models(nodes, own_defaults=False)
            assert list(models.absent()) == [f"prefill node 1 of 1 is not ready: {node.problem}"]

        with_node(use, "prefill", servers(hosts["prefill"]), routers(hosts["router"]))
        (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert told.startswith("prefill node at 127.0.0.1:")
        assert f": {says}" in told

    def test_a_role_that_may_not_watch(self, hosts, caplog, monkeypatch):
        """Whose certificate lets it call at all: kvferry makes no such."""
        monkeypatch.setattr(certs, "ROLES", dict.fromkeys(certs.ROLES, certs.CALLS))
        hosts["decode"].fill()

        async def use(nodes: Nodes, node: Node, worker: Worker) -> None:
            await until(lambda: node.problem)
            await asyncio.sleep(0.5)
            assert node.problem == "it refuses us: the role decode may not call Watch; doctor and router may"
            assert not node.ready
            assert worker.watched == 0

        with_node(use, "prefill", live(hosts["prefill"]), live(hosts["decode"]))
        ours = [record.getMessage() for record in caplog.records if record.name == nodes_module.__name__]
        theirs = {record.getMessage().partition(" is refused: ")[2] for record in caplog.records} - {""}
        assert [line.partition(": ")[2] for line in ours] == [
            "it refuses us: the role decode may not call Watch; doctor and router may"
        ]
        assert theirs == {"the role decode may not call Watch; doctor and router may"}

    @pytest.mark.parametrize("side", ["prefill", "router"])
    def test_right_files_mend_it(self, side, hosts, caplog):
        """Of whoever had wrong ones; nobody is started anew."""
        caplog.set_level(logging.INFO)
        wrong = {name: live(folder) for name, folder in hosts.items()}
        wrong[side] = of_another_ca_that_trusts_ours(hosts[side])

        async def use(nodes: Nodes, node: Node, worker: Worker) -> None:
            await until(lambda: node.problem)
            hosts[side].fill()
            await comes_up(nodes, node, worker)

        with_node(use, "prefill", wrong["prefill"], wrong["router"])
        assert "is another one now, valid until" in caplog.text

    def test_who_is_just_not_there_is_no_problem(self, hosts):
        async def main() -> None:
            with socket.socket() as nobody:
                nobody.bind(("127.0.0.1", 0))
                nodes = Nodes((f"127.0.0.1:{nobody.getsockname()[1]}",), (), live(hosts["router"]))
                nodes.start()
                await asyncio.sleep(0.5)
                assert nodes.all[0].problem == ""
                await nodes.close()

        asyncio.run(main())


class TestRotation:
    def test_calls_go_on_where_they_began(self, hosts):
        """New ones go over a new connection; the old one is closed with its last call."""

        async def use(nodes: Nodes, node: Node, worker: Worker) -> None:
            await comes_up(nodes, node, worker)
            older, fills = node.link, []
            for _ in range(3):
                fills.append(node.stub.Fill())
                await fills[-1].write(pb.FillCommand())
                assert (await fills[-1].read()).started
            hosts["router"].put(hosts["router"].issue())
            await until(lambda: node.link is not older)
            assert node.ready
            assert len(connections(node)) == 2
            last = node.stub.Fill()
            for fill in (*fills, last):
                await fill.write(pb.FillCommand())
                assert (await fill.read()).started
            while fills:
                assert len(connections(node)) == 2
                fill = fills.pop()
                await fill.done_writing()
                assert (await fill.read()).done
                assert await fill.code() is grpc.StatusCode.OK
            del fill  # whoever holds a call, though it is over, keeps gRPC from closing its connection
            await until(lambda: len(connections(node)) == 1)
            await last.done_writing()
            assert (await last.read()).done
            assert worker.watched == 2

        with_node(use, "prefill", live(hosts["prefill"]), live(hosts["router"]))

    def test_what_a_decode_node_gives_goes_on_where_it_began(self, hosts):
        async def use(nodes: Nodes, node: Node, worker: Worker) -> None:
            await comes_up(nodes, node, worker)
            older, broke = node.link, []
            with node.stream():
                older.subscription.add(lambda event: broke.append(event))
                hosts["router"].put(hosts["router"].issue())
                await until(lambda: node.link is not older)
                assert node.ready
                await asyncio.sleep(0.3)
                assert (broke, older.subscription.open) == ([], True)
                assert len(connections(node)) == 2
            await until(lambda: len(connections(node)) == 1)
            assert broke == [None], "who waited for more is told"
            assert node.ready

        with_node(use, "decode", live(hosts["decode"]), live(hosts["router"]))

    def test_a_certificate_that_a_worker_does_not_take_is_not_used(self, hosts, caplog):
        """The hosts got the files of different CAs; what is open is used on, until there are right ones."""

        async def use(nodes: Nodes, node: Node, worker: Worker) -> None:
            await comes_up(nodes, node, worker)
            older, seen = node.link, []
            of_another_ca_that_trusts_ours(hosts["router"])
            await until(lambda: node.problem)
            for _ in range(50):
                fill = node.stub.Fill()
                await fill.done_writing()
                seen.append((await fill.read()).done and node.ready and node.link is older)
                await asyncio.sleep(0.01)
            assert all(seen)
            hosts["router"].fill()
            await until(lambda: node.link is not older)
            assert (node.problem, node.ready) == ("", True)

        with_node(use, "prefill", live(hosts["prefill"]), live(hosts["router"]))
        told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert sum("for which that of before does not vouch" in one for one in told) == 1
        assert sum(one.endswith("; calls go on with the certificates of before") for one in told) == 1

    def test_many_in_a_row(self, hosts):
        """However they come, the newest counts in the end, and nothing is left of the others."""

        async def use(nodes: Nodes, node: Node, worker: Worker) -> None:
            await comes_up(nodes, node, worker)
            first = node.link
            for _ in range(10):
                hosts["router"].put(hosts["router"].issue())
                await asyncio.sleep(0.12)
                fill = node.stub.Fill()
                await fill.done_writing()
                assert (await fill.read()).done
            newest = (hosts["router"].path / "router.pem").read_bytes()
            await until(lambda: node.link is not first and node.link.shown == newest)
            await until(lambda: len(connections(node)) == 1)

        with_node(use, "prefill", live(hosts["prefill"]), live(hosts["router"]))

    @pytest.mark.parametrize("order", [("router", "prefill"), ("prefill", "router")], ids=" ".join)
    def test_a_new_ca_host_by_host(self, order, hosts):
        """In either order; and a router that starts anew halfway is let in, too."""
        old, new = hosts["router"].ca, certs.new_authority(datetime.now(UTC))
        bridge = certs.vouch(old, new, datetime.now(UTC))

        async def comes_up_anew(address: str) -> None:
            nodes = Nodes((address,), (), live(hosts["router"]))
            nodes.start()
            assert await nodes.wait_for(lambda: nodes.all[0].ready, PATIENCE_S)
            await nodes.close()

        async def use(nodes: Nodes, node: Node, worker: Worker) -> None:
            await comes_up(nodes, node, worker)
            servers = worker.live.now
            for role in order:
                hosts[role].trust(new, old)
                hosts[role].put(certs.issue(new, role, datetime.now(UTC)), bridge)
                if role == "router":
                    shown = (hosts[role].path / "router.pem").read_bytes()
                    await until(lambda shown=shown: node.link.shown == shown)
                else:
                    await until(lambda: worker.live.now is not servers)
                assert node.ready
                await comes_up_anew(node.address)

        with_node(use, "prefill", live(hosts["prefill"]), live(hosts["router"]))
