"""Identity: what a block is called, and who can work that out.

A block's name is its whole prefix under a key that only its tenant's requests carry. Two equal names mean equal
tokens, tenant, model, layout and `cache_salt`; without the key nobody can guess a name from a text.

    K(purpose) = HKDF-SHA256(cluster secret, info = LP("kvferry/1", purpose, tenant, tenant_salt))
    root       = BLAKE2b-256(key=K(chain), person="kvf-root",  LP(fingerprint, layout version, dtype, block_size, salt))
    name_i     = BLAKE2b-256(key=K(chain), person="kvf-block", name_{i-1} || token ids as u32le || LP(extras))

tests/vectors/identity.json holds values that another implementation can check itself against.
"""

import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated, NewType

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta

from kvferry.common.block import LAYOUT_VERSION, BlockLayout

BlockName = NewType("BlockName", bytes)
TenantId = NewType("TenantId", str)

NAME_BYTES = 32
KEY_BYTES = 32
TENANT_SALT_BYTES = 32
MAX_SPAN = 65536  # blocks of a chain in one message
SEGMENT = 64  # blocks of a chain that the directory keeps side by side

Name = Annotated[BlockName, Meta(min_length=NAME_BYTES, max_length=NAME_BYTES)]  # where it is decoded


def length_prefixed(*fields: str | bytes | int) -> bytes:
    """LP of DESIGN section 4: a type byte, the length as u32le, the bytes, for each field.

    Text is UTF-8, an int is a signed 64-bit little-endian number. Injective: no two field lists give the same bytes.
    Raises TypeError for any other type, OverflowError for an int outside 64 bits.
    """
    parts = []
    for value in fields:
        if isinstance(value, str):
            kind, data = b"s", value.encode()
        elif isinstance(value, bytes):
            kind, data = b"b", value
        elif isinstance(value, int) and not isinstance(value, bool):
            kind, data = b"i", value.to_bytes(8, "little", signed=True)
        else:
            raise TypeError(f"a field is text, bytes or an integer, not {type(value).__name__}")
        parts += (kind, struct.pack("<I", len(data)), data)
    return b"".join(parts)


def derive_key(secret: bytes, purpose: str, tenant: TenantId, tenant_salt: bytes) -> bytes:
    """K(purpose): 32 bytes that belong to one tenant and one purpose (HKDF-SHA256, RFC 5869, empty salt)."""
    info = length_prefixed("kvferry/1", purpose, tenant, tenant_salt)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """What a worker needs of a tenant: the key of its names, the key its blocks are sealed with, and a pseudonym. None
    tells the tenant's name.

    `chain` and `seal` are secret: they are left out of every repr and must never be logged. Without `seal` the blocks
    are plain. `pseudonym` is 16 hex digits derived from `chain`, so it changes when the tenant's salt does.
    """

    chain: bytes = field(repr=False)
    seal: bytes | None = field(repr=False)
    pseudonym: str

    @classmethod
    def derive(cls, secret: bytes, tenant: TenantId, tenant_salt: bytes) -> "TenantKeys":
        return cls.of(*(derive_key(secret, purpose, tenant, tenant_salt) for purpose in ("chain", "seal")))

    @classmethod
    def of(cls, chain: bytes, seal: bytes | None = None) -> "TenantKeys":
        """Raises ValueError for a key of another length than `KEY_BYTES`."""
        if len(chain) != KEY_BYTES or (seal is not None and len(seal) != KEY_BYTES):
            raise ValueError(f"a tenant's keys have {KEY_BYTES} bytes each")
        return cls(chain, seal, blake2b(key=chain, person=b"kvf-tenant", digest_size=8).hexdigest())


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive blocks of one chain. `first` is the place of `names[0]` in it, `parent` the name before that (the
    scope's root for the chain's first block).

    The directory keeps the names of one segment of `SEGMENT` blocks together; `anchor` is the name of the block at
    which the segment of `names[0]` begins. The bounds hold for what is decoded.
    """

    names: Annotated[tuple[Name, ...], Meta(max_length=MAX_SPAN)]
    first: Annotated[int, Meta(ge=0, lt=2**32)]
    parent: Name
    anchor: Name

    @classmethod
    def of(cls, names: Sequence[BlockName], root: BlockName, first: int = 0, end: int | None = None) -> "Span":
        """Blocks `first .. end - 1` of a chain whose names, from its first block on, are given."""
        part = tuple(names[first:end])
        at = first // SEGMENT * SEGMENT
        return cls(part, first, names[first - 1] if first else root, names[at] if part else root)

    def __len__(self) -> int:
        return len(self.names)

    def from_(self, offset: int, end: int | None = None) -> "Span":
        """The part of it from its block `offset` on."""
        if not offset:
            return self if end is None else Span(self.names[:end], self.first, self.parent, self.anchor)
        names = self.names[offset:end]
        anchor = self.anchors(offset, offset + 1)[0] if names else self.anchor
        return Span(names, self.first + offset, self.names[offset - 1], anchor)

    def anchors(self, start: int = 0, end: int | None = None) -> list[BlockName]:
        """For each of `names[start:end]`, the name of the block at which its segment begins."""
        first = self.first
        begins = (i - (first + i) % SEGMENT for i in range(*slice(start, end).indices(len(self.names))))
        return [self.names[i] if i >= 0 else self.anchor for i in begins]


@dataclass(frozen=True, slots=True)
class CacheScope:
    """Everything that makes KV interchangeable, apart from the tokens themselves.

    `fingerprint` identifies the weights and our arithmetic (engine.loading computes it), `cache_salt` narrows the
    scope within its tenant; the empty text means none.
    """

    keys: TenantKeys
    fingerprint: bytes
    layout: BlockLayout
    cache_salt: str = ""

    def root(self) -> BlockName:
        """The parent of every first block in this scope."""
        scope = length_prefixed(
            self.fingerprint, LAYOUT_VERSION, self.layout.dtype, self.layout.block_size, self.cache_salt
        )
        return BlockName(blake2b(scope, key=self.keys.chain, person=b"kvf-root", digest_size=NAME_BYTES).digest())

    def chain(self, token_ids: Sequence[int], parent: BlockName | None = None) -> list[BlockName]:
        """Names of the full blocks of `token_ids`, in order; a last partial block has no name.

        `parent` continues a chain (the name of the block before `token_ids[0]`); without it the chain starts at the
        root. Token ids must lie in [0, 2**32): check them against the vocabulary first. Raises OverflowError.
        """
        step = self.layout.block_size * 4
        tokens = array("I", token_ids)
        if sys.byteorder == "big":
            tokens.byteswap()
        data = tokens.tobytes()
        name = self.root() if parent is None else parent
        keyed = blake2b(key=self.keys.chain, person=b"kvf-block", digest_size=NAME_BYTES)  # the key is taken in once
        names = []
        for end in range(step, len(data) + 1, step):
            block = keyed.copy()
            block.update(name + data[end - step : end])
            names.append(name := BlockName(block.digest()))
        return names
