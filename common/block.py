"""A block's bytes: the one layout that page pool, arena, wire and disk share.

Order: `[kv_head][layer][K,V][token][head_dim]`. A block is one contiguous extent. It consists of
`S = min(kv_heads, 8)` segments of equal size, each with a checksum of its own, so that a tensor-parallel rank can read
and write its heads as one contiguous range.
"""

from dataclasses import dataclass

import xxhash

from kvferry.common.errors import IncompatibleNode

LAYOUT_VERSION = 1
PAGE_BYTES = 4096
MAX_SEGMENTS = 8
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROOF_BYTES = 16  # of each segment: XXH3-128 big-endian of a plain one, the AES-GCM tag of a sealed one


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The shape of a block: `[kv_heads, layers, 2, block_size, head_dim]` of `dtype`."""

    kv_heads: int
    layers: int
    block_size: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise IncompatibleNode(f"KV of dtype {self.dtype} is not known; one of {', '.join(DTYPE_BYTES)} is")
        if min(self.kv_heads, self.layers, self.block_size, self.head_dim) < 1:
            raise IncompatibleNode(f"a block layout has only positive dimensions, not {self}")
        if self.block_bytes % self.segments:
            raise IncompatibleNode(f"{self.block_bytes} bytes do not divide into {self.segments} equal segments")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.kv_heads, self.layers, 2, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return self.kv_heads * self.layers * 2 * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def segments(self) -> int:
        return min(self.kv_heads, MAX_SEGMENTS)

    def differences(self, other: "BlockLayout") -> str:
        """What differs, for a person: `block_size 16 against 32`. Empty when nothing does."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__slots__)
        return ", ".join(f"{name} {mine} against {theirs}" for name, mine, theirs in pairs if mine != theirs)


def slot_stride(block_bytes: int) -> int:
    """Bytes from one arena slot to the next: `block_bytes` rounded up to whole pages (a copy to an address that
    is not page-aligned runs at half speed)."""
    return -(-block_bytes // PAGE_BYTES) * PAGE_BYTES


def segment_checksums(payload: memoryview, segments: int) -> bytes:
    """XXH3-128 of each of the `segments` equal parts of a block's bytes, `PROOF_BYTES` a segment, in order."""
    size = len(payload) // segments
    return b"".join([xxhash.xxh3_128_digest(payload[i * size : (i + 1) * size]) for i in range(segments)])
