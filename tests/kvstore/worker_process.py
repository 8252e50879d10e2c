"""A publisher: `python worker_process.py SOCKET LABEL COUNT [FAILPOINT ...]`.

Reserves COUNT names and says so, publishes them after a line on stdin and says how many are there, releases after
another line and says whether the lease held.
"""

import asyncio
import importlib.util
import sys
from pathlib import Path

from kvferry.common.failpoints import Failpoints
from kvferry.common.hashing import Span
from kvferry.kvstore.client import StoreClient


def load_conftest():
    sys.path.append(str(Path(__file__).parents[1]))  # what pytest's own setting gives to the rest
    spec = importlib.util.spec_from_file_location("ground", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def main() -> None:
    ground = load_conftest()
    socket, label, count, *failpoints = sys.argv[1:]
    names = ground.names_of(label, int(count))
    client = StoreClient(Path(socket), ground.BLOCK_BYTES, ground.SEGMENTS, "worker", Failpoints(tuple(failpoints)))
    await client.start()
    reservation = await client.reserve(Span(tuple(names), 0, ground.ROOT, names[0]), tenant="t")
    print("reserved", *(claim.value for claim in reservation.claims), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print("published", await client.publish(reservation, ground.payloads_of(names)), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print("released", await client.release(reservation.lease), flush=True)
    await client.close()


if __name__ == "__main__":
    sys.path.pop(0)
    asyncio.run(main())
