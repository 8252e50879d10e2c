"""What a router finds out of a worker that it cannot speak to; real certificates are in tests/router/test_trust.py."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable

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


def test_nobody(folder):
    for credentials in (folder.credentials(), None):
        assert asyncio.run(handshake.why_refused("127.0.0.1:1", "prefill", credentials)) == ""
        assert asyncio.run(handshake.why_refused("no.such.host.invalid:1", "prefill", credentials)) == ""
