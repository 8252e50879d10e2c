"""A store node as a process of its own: `python node_process.py NOTIFY_FD STORE_CONFIG_AS_JSON`."""

import asyncio
import os
import signal
import sys

import msgspec

from kvferry.common.config import LogConfig, StoreConfig
from kvferry.common.process import Notifier, die_with_parent
from kvferry.common.telemetry import setup_logging
from kvferry.kvstore.node import serve


async def main() -> None:
    fd, config = sys.argv[1:]
    config = msgspec.convert(msgspec.json.decode(config), StoreConfig, dec_hook=lambda kind, text: kind(text))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await serve(config, Notifier(int(fd)), stop)


if __name__ == "__main__":
    sys.path.pop(0)
    die_with_parent(os.getppid())
    setup_logging("store", LogConfig())
    asyncio.run(main())
