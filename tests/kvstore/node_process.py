"""A store node as a process of its own: `python node_process.py SOCKET SIZE_BYTES LEASE_S NOTIFY_FD [WRITING]`."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from kvferry.common.config import LogConfig, StoreConfig
from kvferry.common.process import Notifier, die_with_parent
from kvferry.common.telemetry import setup_logging
from kvferry.kvstore.node import serve


async def main() -> None:
    socket, size, lease, fd, *writing = sys.argv[1:]
    bound = {"writing_per_connection": int(writing[0])} if writing else {}
    config = StoreConfig(socket=Path(socket), size_bytes=int(size), lease_s=float(lease), **bound)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await serve(config, Notifier(int(fd)), stop)


if __name__ == "__main__":
    sys.path.pop(0)
    die_with_parent(os.getppid())
    setup_logging("store", LogConfig())
    asyncio.run(main())
