"""One that knows the stores' secret, and answers other stores as a test likes."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from kvferry.kvstore.peering import Identity

SECRET = "the secret of all stores"


def me(address="127.0.0.1:1", cluster="kvferry", secret=SECRET) -> Identity:
    return Identity(cluster, address, os.urandom(16), secret.encode())


@asynccontextmanager
async def impostor(answer: Callable[[socket.socket], Awaitable[None]]):
    """Somebody at an address, and who it was that called: `answer` for each connection, which is closed then."""
    met: list[asyncio.Task] = []

    async def serve(peer: socket.socket) -> None:
        with peer, suppress(OSError, EOFError):
            await answer(peer)

    async def accept() -> None:
        while True:
            peer, _ = await asyncio.get_running_loop().sock_accept(listener)
            peer.setblocking(False)
            met.append(asyncio.create_task(serve(peer)))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        accepting = asyncio.create_task(accept())
        yield f"127.0.0.1:{listener.getsockname()[1]}", met
        accepting.cancel()
        await asyncio.wait([accepting])
        await asyncio.gather(*met)
