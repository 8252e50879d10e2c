"""Sealed blocks: AES-256-GCM a segment, under a key of the block's own.

    key   = HKDF-SHA256(K(seal), info = LP(name, salt))        salt: 16 random bytes, new with each publish
    nonce = the segment's number, 12 bytes big-endian          never used twice under one key
    AAD   = LP("kvferry/block", name, parent, bytes of a block, segments, salt)

So a block opens only under its own name, behind its own parent, whole, and for its own tenant.
tests/vectors/seal.json holds values that another implementation can check itself against.

`cryptography` gives up the interpreter lock while it works on a segment, so sealing and opening run beside the event
loop and beside each other.
"""

import hmac
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from kvferry.common.block import MAX_SEGMENTS, PROOF_BYTES
from kvferry.common.hashing import BlockName, length_prefixed

SALT_BYTES = 16
MODES = tuple(modes.GCM(segment.to_bytes(12, "big")) for segment in range(MAX_SEGMENTS))


class Seal:
    """Seals and opens the blocks of one tenant. `key` is K(seal), 32 secret bytes."""

    def __init__(self, key: bytes):
        self._extracted = hmac.digest(bytes(32), key, "sha256")  # RFC 5869, section 2.2

    def seal(
        self, name: BlockName, parent: BlockName, data: memoryview, into: memoryview, segments: int
    ) -> tuple[bytes, bytes]:
        """Write a block's bytes, sealed, to `into`, which has the same length. The salt and the tags."""
        salt = os.urandom(SALT_BYTES)
        key, header = self._of(name, parent, salt, len(data), segments)
        size, tags = len(data) // segments, []
        for number, start in enumerate(range(0, len(data), size)):
            part = slice(start, start + size)
            tags.append(encrypt(key, MODES[number], header, data[part], into[part]))
        return salt, b"".join(tags)

    def open(
        self, name: BlockName, parent: BlockName, salt: bytes, tags: bytes, data: memoryview, into: memoryview
    ) -> bool:
        """Write a sealed block's plain bytes to `into`, which has the same length. False, and rubbish there, if
        anything about the block is not as it was sealed. `tags` is one for each of at most MAX_SEGMENTS equal parts."""
        segments = len(tags) // PROOF_BYTES
        key, header = self._of(name, parent, salt, len(data), segments)
        size = len(data) // segments
        for number, start in enumerate(range(0, len(data), size)):
            part, tag = slice(start, start + size), tags[number * PROOF_BYTES : (number + 1) * PROOF_BYTES]
            if not decrypt(key, MODES[number], header, tag, data[part], into[part]):
                return False
        return True

    def _of(
        self, name: BlockName, parent: BlockName, salt: bytes, size: int, segments: int
    ) -> tuple[algorithms.AES256, bytes]:
        """The block's key, and its AAD."""
        key = hmac.digest(self._extracted, length_prefixed(name, salt) + b"\x01", "sha256")  # RFC 5869, section 2.3
        return algorithms.AES256(key), length_prefixed("kvferry/block", name, parent, size, segments, salt)


def encrypt(key: algorithms.AES256, mode: modes.GCM, header: bytes, data: memoryview, into: memoryview) -> bytes:
    """The tag."""
    cipher = Cipher(key, mode).encryptor()
    cipher.authenticate_additional_data(header)
    cipher.update_into(data, into)
    cipher.finalize()
    return cipher.tag


def decrypt(
    key: algorithms.AES256, mode: modes.GCM, header: bytes, tag: bytes, data: memoryview, into: memoryview
) -> bool:
    """Whether the tag is right."""
    cipher = Cipher(key, mode).decryptor()
    cipher.authenticate_additional_data(header)
    cipher.update_into(data, into)
    try:
        cipher.finalize_with_tag(tag)
    except InvalidTag:
        return False
    return True
