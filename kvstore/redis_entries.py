"""What the directory writes to Redis: its keys, and a node's address and boot id as their values.

A block's hints: `kvf:{A}:N:place`, a fill's claim: `kvf:{A}:c:N`, and who is taking it over: `kvf:{A}:t:N`. A: the
first 8 bytes of the anchor, N: the first 16 of the name, in hex; what is in braces picks the server of a cluster, so a
segment's keys lie together. Two names that share 16 bytes would be a stale hint.

A value: 4 bytes of the XXH3-64 of the rest, a version byte, the boot id, the address.
"""

from collections.abc import Sequence

import xxhash

from kvferry.kvstore.directory import PLACES, Holder, Key
from kvferry.kvstore.redis_target import KEY_PREFIX

VERSION = b"\1"
CHECK_BYTES = 4
BOOT_ID_BYTES = 16
MAX_VALUE_BYTES = CHECK_BYTES + 1 + BOOT_ID_BYTES + 261  # a DNS name of 255 bytes, a colon and a port
MAX_KNOWN = 1024
ENDS = tuple(f":{place}" for place in range(PLACES))


def hint_key(key: Key, place: int) -> str:
    return f"{KEY_PREFIX}{{{key.anchor[:8].hex()}}}:{key.name[:16].hex()}:{place}"


def claim_key(key: Key) -> str:
    return f"{KEY_PREFIX}{{{key.anchor[:8].hex()}}}:c:{key.name[:16].hex()}"


def turn_key(key: Key) -> str:
    return f"{KEY_PREFIX}{{{key.anchor[:8].hex()}}}:t:{key.name[:16].hex()}"


def mark_key(holder: Holder, tag: str) -> str:
    """A key of a node's own, where `tag` says."""
    return f"{KEY_PREFIX}{{{tag}}}:mark:{xxhash.xxh3_64_hexdigest(holder.address.encode())}"


def segments(keys: Sequence[Key]) -> list[list[str]]:
    """All places of each key, in order, cut where the anchor changes: what one MGET can ask for."""
    found: list[list[str]] = []
    anchor = None
    for key_anchor, key_name in keys:
        if key_anchor != anchor:
            anchor = key_anchor
            start = f"{KEY_PREFIX}{{{anchor[:8].hex()}}}:"
            segment: list[str] = []
            found.append(segment)
            append = segment.append
        name = start + key_name[:16].hex()
        for end in ENDS:
            append(name + end)
    return found


def encode(holder: Holder) -> bytes:
    rest = VERSION + holder.boot_id + holder.address.encode()
    return xxhash.xxh3_64_digest(rest)[:CHECK_BYTES] + rest


def decode(value: object) -> Holder | None:
    """None for what `encode` did not make."""
    if not isinstance(value, bytes) or len(value) > MAX_VALUE_BYTES:
        return None
    check, rest = value[:CHECK_BYTES], value[CHECK_BYTES:]
    boot_id, address = rest[1 : 1 + BOOT_ID_BYTES], rest[1 + BOOT_ID_BYTES :]
    if not address or rest[:1] != VERSION or xxhash.xxh3_64_digest(rest)[:CHECK_BYTES] != check:
        return None
    host, _, port = address.decode("ascii", "replace").rpartition(":")
    if not host.isascii() or not host.isprintable() or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return None
    return Holder(address.decode(), boot_id)


class Decoder:
    """What Redis has for one node, which is not told of itself. `bad` counts values that `encode` did not make.

    What was seen is known: there are few different values, for they name nodes.
    """

    def __init__(self, me: Holder) -> None:
        self.bad = 0
        self._me = me
        self._known: dict[tuple[object, ...], tuple[Holder, ...]] = {}

    def holder(self, value: object) -> Holder | None:
        if value is None:
            return None
        if (holder := decode(value)) is None:
            self.bad += 1
        return holder

    def holders(self, values: Sequence[object]) -> list[tuple[Holder, ...]]:
        """Of names, who else has each: `PLACES` values a name."""
        known = self._known.get
        names = zip(*[iter(values)] * PLACES, strict=True)
        return [found if (found := known(name)) is not None else self._others(name) for name in names]

    def _others(self, values: tuple[object, ...]) -> tuple[Holder, ...]:
        bad = self.bad
        holders = [holder for value in values if (holder := self.holder(value)) is not None]
        others = {holder.address: holder for holder in holders if holder.address != self._me.address}
        if self.bad == bad:  # those are counted each time
            if len(self._known) == MAX_KNOWN:
                self._known.clear()
            self._known[values] = tuple(others.values())
        return tuple(others.values())
