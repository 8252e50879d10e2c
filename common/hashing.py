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
from typing import NewType

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvferry.common.block import LAYOUT_VERSION, BlockLayout

BlockName = NewType("BlockName", bytes)
TenantId = NewType("TenantId", str)

NAME_BYTES = 32
KEY_BYTES = 32
TENANT_SALT_BYTES = 32


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
    """What a worker needs of a tenant: the key of its names and a pseudonym. Neither tells the tenant's name.

    `chain` is secret: it is left out of every repr and must never be logged. `pseudonym` is 16 hex digits derived
    from it, so it changes when the tenant's salt does.
    """

    chain: bytes = field(repr=False)
    pseudonym: str

    @classmethod
    def derive(cls, secret: bytes, tenant: TenantId, tenant_salt: bytes) -> "TenantKeys":
        return cls.from_chain_key(derive_key(secret, "chain", tenant, tenant_salt))

    @classmethod
    def from_chain_key(cls, chain: bytes) -> "TenantKeys":
        if len(chain) != KEY_BYTES:
            raise ValueError(f"a chain key has {KEY_BYTES} bytes, not {len(chain)}")
        return cls(chain, blake2b(key=chain, person=b"kvf-tenant", digest_size=8).hexdigest())


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
