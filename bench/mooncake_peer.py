"""The Mooncake Store side of bench/store_remote.py, under an interpreter that has mooncake; it needs nothing else.

    python mooncake_peer.py master                     prints where the master's program is
    python mooncake_peer.py hold MASTER COUNT SIZE     keeps blocks in a segment of its own until stdin closes
    python mooncake_peer.py get MASTER COUNT SIZE      reads them all at each line of stdin, and says how many are right

`MASTER` is its host:port. Blocks are registered memory of whole pages; a get is one batch_get_into over TCP.
"""

import ctypes
import mmap
import random
import sys
from pathlib import Path

from mooncake import store as mooncake

BUFFER_BYTES = 16 * 2**20  # for what is not read into memory that was registered
SEGMENT_SPARE = 2  # a segment has room for so many times what is kept in it
SEED = 1


def main() -> None:
    mode, *rest = sys.argv[1:]
    if mode == "master":
        print(Path(mooncake.__file__).with_name("mooncake_master"))
        return
    master, count, size = rest[0], int(rest[1]), int(rest[2])
    blocks = Blocks(master, count, size, hold=mode == "hold")
    if mode == "hold":
        blocks.put()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(blocks.get(), flush=True)
    blocks.store.close()


class Blocks:
    """`count` blocks of `size` bytes, in memory that the store may read and write."""

    def __init__(self, master: str, count: int, size: int, hold: bool):
        self._names = [f"block-{i}" for i in range(count)]
        self._expected = random.Random(SEED).randbytes(count * size)
        self._memory = mmap.mmap(-1, count * size)
        self._memory[:] = bytes(count * size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._pointers = [start + i * size for i in range(count)]
        self._sizes = [size] * count
        self.store = mooncake.MooncakeDistributedStore()
        segment = SEGMENT_SPARE * count * size if hold else 0
        require(self.store.setup("127.0.0.1", "P2PHANDSHAKE", segment, BUFFER_BYTES, "tcp", "", master), "set up")
        require(self.store.register_buffer(start, count * size), "register memory")

    def put(self) -> None:
        self._memory[:] = self._expected
        for result in self.store.batch_put_from(self._names, self._pointers, self._sizes):
            require(result, "put")

    def get(self) -> int:
        """How many blocks came. The first time their bytes are looked at, too; that takes longer."""
        results = self.store.batch_get_into(self._names, self._pointers, self._sizes)
        if self._expected:
            if self._memory[:] != self._expected:
                raise SystemExit("mooncake gave other bytes than were put")
            self._expected = b""
        return sum(result == size for result, size in zip(results, self._sizes, strict=True))


def require(result: int, what: str) -> None:
    if result != 0:
        raise SystemExit(f"mooncake could not {what}: {result}")


if __name__ == "__main__":
    main()
