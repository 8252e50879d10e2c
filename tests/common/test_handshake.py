"""What a router finds out of a worker that it cannot speak to; real certificates are in tests/router/test_trust.py."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from datetime import datetime
from threading import Thread

import pytest
from handshakes import context
from trust_folder import Folder

from kvferry.common import handshake
from kvferry.common.certs import Leaf
from kvferry.common.credentials import Credentials

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "router", "router").fill()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello")
    await reader.read()
    writer.close()


def told(serve: Serve, credentials: Credentials | None, tls: ssl.SSLContext | None = None, times: int = 9) -> str:
    """What is said of a server of this kind, which is there for so many connections."""

    async def main() -> str:
        came = 0

        async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal came
            came += 1
            if came == times:
                server.close()
            await serve(reader, writer)

        server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=tls)
        port = server.sockets[0].getsockname()[1]
        try:
            return await handshake.why_refused(f"127.0.0.1:{port}", "prefill", credentials)
        finally:
            server.close()

    return asyncio.run(main())


def of(folder: Folder, leaf: Leaf) -> ssl.SSLContext:
    return context(ssl.PROTOCOL_TLS_SERVER, leaf, [folder.ca])


def test_who_answers_as_it_should(folder):
    assert told(greet, folder.credentials(), of(folder, folder.issue("prefill"))) == ""


def test_who_hangs_up_does_not_like_us(folder):
    server = of(folder, folder.issue("prefill"))
    assert told(hang_up, folder.credentials(), server).startswith("it refuses our certificate; perhaps")
    assert told(hang_up, folder.credentials(), server, times=1) == "", "it was just ending"


def test_roles(folder):
    assert told(greet, folder.credentials(), of(folder, folder.issue("decode"))) == (
        "its certificate is that of decode, not of prefill"
    )
    assert told(greet, folder.credentials(), of(folder, folder.issue("router"))) == (
        "its certificate is that of a role that only calls"
    )


def test_dates(folder):
    assert told(greet, folder.credentials(), of(folder, folder.issue("prefill", days=5, ago=9))).startswith(
        "its certificate has expired"
    )
    assert told(greet, folder.credentials(), of(folder, folder.issue("prefill", ago=-1))) == (
        "its certificate is not valid yet; set the clocks"
    )


def test_who_speaks_no_tls_or_nothing_at_all(folder, monkeypatch):
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    monkeypatch.setattr(handshake, "PATIENCE_S", 0.2)
    for credentials in (folder.credentials(), None):
        plain = "it answers without certificates; start it with --certs, too"
        assert told(greet, credentials) == (plain if credentials else "")
        assert told(hang_up, credentials) == ""
        assert told(silent, credentials) == ""


def expiry(server: ssl.SSLContext, credentials: Credentials, visits: int) -> tuple[datetime | None, list[str]]:
    """What is seen of a server's certificate in so many visits, and what the server has to complain of them."""
    complaints: list[str] = []

    def serve() -> None:
        for _ in range(visits):
            came, _ = listener.accept()
            with came:
                try:
                    with server.wrap_socket(came, server_side=True) as peer:
                        peer.sendall(b"hello")
                except ssl.SSLError as error:
                    complaints.append(error.reason)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        serving = Thread(target=serve)
        serving.start()
        port = listener.getsockname()[1]
        seen = asyncio.run(handshake.expiry_at(f"127.0.0.1:{port}", "prefill", credentials))
        serving.join()
    return seen, complaints


def test_looking_at_a_certificate_leaves_no_complaint(folder):
    """Who may come shows his own certificate first. A server that shows one of another CA, or an expired one, is asked
    without, as nobody could tell until when it is valid otherwise."""
    leaf = folder.issue("prefill", days=5)
    assert expiry(of(folder, leaf), folder.credentials(), 1) == (leaf.certificate.not_valid_after_utc, [])
    old = folder.issue("prefill", days=5, ago=9)
    seen, complaints = expiry(of(folder, old), folder.credentials(), 2)
    assert seen == old.certificate.not_valid_after_utc
    assert complaints[1:] == ["PEER_DID_NOT_RETURN_A_CERTIFICATE"]


def test_nobody(folder):
    for credentials in (folder.credentials(), None):
        assert asyncio.run(handshake.why_refused("127.0.0.1:1", "prefill", credentials)) == ""
        assert asyncio.run(handshake.why_refused("no.such.host.invalid:1", "prefill", credentials)) == ""
