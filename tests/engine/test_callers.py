"""Who may call what of a worker, over real TLS: each RPC of both services, with a certificate of each role."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import product

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from trust_folder import Folder

from kvferry.common import certs, credentials
from kvferry.common.certs import CALLS, ROLES, Leaf
from kvferry.common.credentials import LiveCredentials
from kvferry.common.errors import NotAllowed
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.wire import error_of, first_command
from kvferry.engine.callers import OnlyRoles, server_credentials

METHODS = {  # every RPC there is
    (service, method.name): method
    for service in ("Prefill", "Decode")
    for method in pb.DESCRIPTOR.services_by_name[service].methods
}
WATCH, FILL = ("Prefill", "Watch"), ("Prefill", "Fill")
ALLOWED = {rpc: {"router", "doctor"} if rpc[1] == "Watch" else {"router"} for rpc in METHODS}


def kind_of(method: MethodDescriptor) -> str:
    return f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"


def answer_of(rpc: tuple[str, str]) -> object:
    return GetMessageClass(METHODS[rpc].output_type)()


def handler_of(rpc: tuple[str, str]) -> grpc.RpcMethodHandler:
    """Answers with one message."""
    method, answer = METHODS[rpc], answer_of(rpc)

    async def one(request, context):
        if method.client_streaming:
            await first_command(request)
        return answer

    async def several(request, context):
        yield await one(request, context)

    make = getattr(grpc, f"{kind_of(method)}_rpc_method_handler")
    decode = GetMessageClass(method.input_type).FromString
    return make(several if method.server_streaming else one, decode, type(answer).SerializeToString)


@pytest.fixture
def folder(tmp_path) -> Folder:
    """That of a worker which listens."""
    return Folder(tmp_path / "prefill", "prefill").fill()


@asynccontextmanager
async def serving(live: LiveCredentials) -> AsyncIterator[int]:
    server = grpc.aio.server(interceptors=(OnlyRoles(),))
    for service in ("Prefill", "Decode"):
        handlers = {rpc[1]: handler_of(rpc) for rpc in METHODS if rpc[0] == service}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(f"kvferry.v1.{service}", handlers)])
    port = server.add_secure_port("127.0.0.1:0", server_credentials(live))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


@asynccontextmanager
async def calling(port: int, folder: Folder, leaf: Leaf | None) -> AsyncIterator[grpc.aio.Channel]:
    shown = (certs.key_to_pem(leaf.key), certs.to_pem([leaf.certificate])) if leaf else ()
    secret = grpc.ssl_channel_credentials((folder.path / "ca.pem").read_bytes(), *shown)
    options = (("grpc.ssl_target_name_override", certs.server_name("prefill")), ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", secret, options=options) as channel:
        yield channel


def begin(channel: grpc.aio.Channel, rpc: tuple[str, str]) -> grpc.aio.Call:
    method = METHODS[rpc]
    request_type = GetMessageClass(method.input_type)
    make = getattr(channel, kind_of(method))
    call = make("/kvferry.v1.{}/{}".format(*rpc), request_type.SerializeToString, type(answer_of(rpc)).FromString)
    return call() if method.client_streaming else call(request_type())


async def one_answer(channel: grpc.aio.Channel, rpc: tuple[str, str]) -> object:
    """The first message of a call."""
    method, call = METHODS[rpc], begin(channel, rpc)
    if method.client_streaming:
        await call.write(GetMessageClass(method.input_type)())
        await call.done_writing()
    return await (call.read() if method.server_streaming else call)


def with_channel(folder: Folder, leaf: Leaf | None, use: Callable[[grpc.aio.Channel], Awaitable[object]]) -> object:
    async def main() -> object:
        async with serving(LiveCredentials(folder.path, "prefill")) as port, calling(port, folder, leaf) as channel:
            return await use(channel)

    return asyncio.run(main())


@pytest.mark.parametrize(("role", "rpc"), list(product(ROLES, ALLOWED)), ids=str)
def test_each_role_calls_what_it_may(role, rpc, folder, monkeypatch, caplog):
    """Also where the certificate of a worker's role were one that can call at all, which those that we make cannot."""
    monkeypatch.setattr(certs, "ROLES", dict.fromkeys(ROLES, CALLS))
    leaf = folder.issue(role)
    monkeypatch.undo()
    if role in ALLOWED[rpc]:
        assert with_channel(folder, leaf, lambda channel: one_answer(channel, rpc)) == answer_of(rpc)
        assert not caplog.records
        return
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        with_channel(folder, leaf, lambda channel: one_answer(channel, rpc))
    error = error_of(refused.value)
    whoever = " and ".join(sorted(ALLOWED[rpc]))
    assert type(error) is NotAllowed
    assert str(error) == f"the role {role} may not call {rpc[1]}; {whoever} may"
    (told,) = caplog.records
    assert told.levelname == "WARNING"
    assert told.getMessage().startswith("a call from ipv4:127.0.0.1:")
    assert told.getMessage().endswith(f" is refused: {error}")


def test_an_rpc_that_is_not_in_the_table_is_for_nobody(folder, monkeypatch):
    monkeypatch.setattr("kvferry.engine.callers.MAY_CALL", {})
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        with_channel(folder, folder.issue("router"), lambda channel: one_answer(channel, WATCH))
    assert str(error_of(refused.value)) == "the role router may not call Watch; nobody may"


def test_a_method_that_does_not_exist(folder):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        with_channel(folder, folder.issue("router"), lambda channel: channel.unary_unary("/kvferry.v1.Prefill/No")(b""))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("which", ["none", "expired", "not yet", "other CA", "a worker's", "no role"])
def test_who_is_not_let_in_at_all(which, folder, monkeypatch):
    other = Folder(folder.path, "router")
    leaf = {
        "none": lambda: None,
        "expired": lambda: folder.issue("router", days=5, ago=9),
        "not yet": lambda: folder.issue("router", ago=-1),
        "other CA": other.issue,
        "a worker's": lambda: folder.issue("decode"),
        "no role": lambda: certs.Leaf(folder.ca.certificate, folder.ca.key),
    }[which]()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        with_channel(folder, leaf, lambda channel: one_answer(channel, WATCH))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_plain_client_is_not_let_in(folder):
    async def main() -> None:
        async with (
            serving(LiveCredentials(folder.path, "prefill")) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            await one_answer(channel, WATCH)

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        asyncio.run(main())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_changed_certificate_counts_for_new_connections_and_leaves_open_ones_alone(folder, monkeypatch):
    """Here it is of another CA, so that nobody could take the one for the other."""
    monkeypatch.setattr(credentials, "LOOK_EVERY_S", 0.01)
    old, new = Folder(folder.path, "prefill", folder.ca), Folder(folder.path, "prefill")
    router = folder.issue("router")

    async def main() -> None:
        live = LiveCredentials(folder.path, "prefill")
        changed = asyncio.Event()
        looking = asyncio.create_task(live.watch(lambda _: changed.set()))
        async with serving(live) as port, calling(port, old, router) as before:
            assert await one_answer(before, FILL) == pb.FillReport()
            opened = begin(before, FILL)
            new.fill()
            async with asyncio.timeout(10):
                await changed.wait()
            async with calling(port, new, new.issue("router")) as after:
                assert await one_answer(after, FILL) == pb.FillReport()
            async with calling(port, new, router) as of_the_old_ca:
                with pytest.raises(grpc.aio.AioRpcError):
                    await one_answer(of_the_old_ca, FILL)
            await opened.write(pb.FillCommand())
            assert await opened.read() == pb.FillReport()
            assert await one_answer(before, FILL) == pb.FillReport()
        looking.cancel()

    asyncio.run(main())
