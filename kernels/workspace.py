"""Memory that the CPU's attention keeps from step to step."""

import math

import torch


class Workspace:
    """Buffers kept from step to step: fresh memory would be touched for the first time at each use."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What was taken under this name and dtype before, in a new shape; grows by doubling."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < count:
            buffer = torch.empty(max(count, 0 if buffer is None else 2 * len(buffer)), dtype=dtype)
            self._buffers[name, dtype] = buffer
        return buffer[:count].view(shape)


def tiles_of_layer(pool: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values, `[num_blocks * kv_heads, block_size * head_dim]` each, as views of the contiguous
    `pool[num_blocks, kv_heads, layers, 2, block_size, head_dim]`: one list of tiles serves all layers."""
    blocks, kv_heads, layers, _, block_size, head_dim = pool.shape
    size = block_size * head_dim
    shape, strides, start = (blocks * kv_heads, size), (2 * layers * size, 1), 2 * layer * size
    return pool.as_strided(shape, strides, start), pool.as_strided(shape, strides, start + size)
