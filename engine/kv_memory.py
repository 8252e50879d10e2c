"""The page pool's memory: one tensor, and each block of it as bytes."""

import logging
import mmap

import torch

from kvferry.common.block import BlockLayout
from kvferry.common.errors import ConfigError

log = logging.getLogger(__name__)


def ask_for_huge_pages(pages: mmap.mmap) -> None:
    """Reading blocks from all over the pool misses the TLB less then. A system that has none is as well."""
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError) as error:
        log.debug("the page pool lies in pages of ordinary size: %s", error)


class KvMemory:
    """`tensor` is `[num_blocks, kv_heads, layers, 2, block_size, head_dim]`, zeroed; a block is one contiguous extent.

    On the CPU it lies in page-aligned anonymous memory that the system hands out as it is touched.
    """

    def __init__(self, layout: BlockLayout, num_blocks: int, device: torch.device):
        self.layout = layout
        shape, dtype = (num_blocks, *layout.shape), getattr(torch, layout.dtype)
        if device.type == "cpu":
            try:
                pages = mmap.mmap(-1, num_blocks * layout.block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise ConfigError(
                    f"{num_blocks} KV blocks of {layout.block_bytes} bytes do not fit in memory"
                ) from error
            ask_for_huge_pages(pages)
            self._bytes = memoryview(pages)
            self.tensor = torch.frombuffer(self._bytes, dtype=dtype).view(shape)
        else:
            self._bytes = None
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    def host_view(self, block: int) -> memoryview:
        """A block's bytes, `layout.block_bytes` long: in place on the CPU, else a host copy of what it holds now."""
        size = self.layout.block_bytes
        if self._bytes is not None:
            return self._bytes[block * size : (block + 1) * size]
        return memoryview(self.tensor[block].flatten().view(torch.uint8).cpu().numpy())

    def landing(self, blocks: list[int]) -> list[memoryview]:
        """Writable host memory for blocks that are about to arrive; `land` puts them in place."""
        if self._bytes is not None:
            return [self.host_view(block) for block in blocks]
        return [memoryview(bytearray(self.layout.block_bytes)) for _ in blocks]

    def land(self, blocks: list[int], arrived: list[memoryview]) -> None:
        """Bring blocks from their `landing` to the pool's device; on the CPU they are there already."""
        if self._bytes is None:
            for block, data in zip(blocks, arrived, strict=True):
                self.tensor[block].flatten().view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))
