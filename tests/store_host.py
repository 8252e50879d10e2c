"""A store node inside the test's own process, with a worker's client: nothing of it is replaced, and a test may look
into it."""

import asyncio
import os
import socket
from pathlib import Path

from kvferry.common.config import StoreConfig
from kvferry.kvstore.arena import ArenaMap, create_arena
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.index import Index
from kvferry.kvstore.network import listen_for_peers
from kvferry.kvstore.node import Node, listen

SEGMENTS = 2
CONNECT_S = 10.0


class Host:
    """`start` and `stop` may alternate; the socket, the address and the client stay."""

    def __init__(self, folder: Path, name: str, block_bytes: int, slots: int, config: type[StoreConfig] = StoreConfig):
        secret = folder / "secret"
        secret.touch(0o600)
        secret.write_text("the secret of all stores")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.config = config(
            socket=folder / f"{name}.sock", size_bytes=slots * block_bytes, listen=self.address, peer_secret_file=secret
        )
        self.client = StoreClient(self.config.socket, block_bytes, SEGMENTS, name)

    @property
    def index(self) -> Index:
        return self._node._index

    @property
    def arena(self) -> ArenaMap:
        return self._node._map

    def changed(self) -> None:
        """After the test has changed the index."""
        self._node._waiters.wake()

    async def start(self) -> None:
        """Until the client is connected."""
        connects = self.client.connects
        self._arena = await create_arena(self.config.size_bytes, lambda done, total: None)
        self._stop, ready = asyncio.Event(), asyncio.Event()
        self._node = Node(self.config, self._arena)
        self._listener = listen(self.config)
        outside = listen_for_peers(self.config.listen)
        self._running = asyncio.create_task(self._node.run(self._listener, self._stop, outside, ready.set))
        await ready.wait()
        if not connects:
            await self.client.start()
        async with asyncio.timeout(CONNECT_S):
            while not (self.client.connects > connects and self.client.connected):  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self._stop.set()
        await self._running
        self._listener.close()
        self.config.socket.unlink()
        os.close(self._arena)
