"""Writes identity.json: names worked out from DESIGN section 4 alone, with hashlib and hmac and nothing of kvferry.

python tests/vectors/make_identity.py
"""

import hmac
import json
import struct
from hashlib import blake2b, sha256
from pathlib import Path


def lp(*fields):
    out = b""
    for value in fields:
        if isinstance(value, str):
            kind, data = b"s", value.encode("utf-8")
        elif isinstance(value, bytes):
            kind, data = b"b", value
        else:
            kind, data = b"i", struct.pack("<q", value)
        out += kind + struct.pack("<I", len(data)) + data
    return out


def hkdf_sha256(secret, info, length=32):
    """RFC 5869; an empty salt is as many zero bytes as the hash has."""
    key = hmac.new(bytes(32), secret, sha256).digest()
    out = previous = b""
    counter = 1
    while len(out) < length:
        previous = hmac.new(key, previous + info + bytes([counter]), sha256).digest()
        out += previous
        counter += 1
    return out[:length]


def names(case):
    secret, salt = bytes.fromhex(case["secret"]), bytes.fromhex(case["tenant_salt"])
    chain = hkdf_sha256(secret, lp("kvferry/1", "chain", case["tenant"], salt))
    seal = hkdf_sha256(secret, lp("kvferry/1", "seal", case["tenant"], salt))
    scope = lp(
        bytes.fromhex(case["fingerprint"]),
        case["layout_version"],
        case["dtype"],
        case["block_size"],
        case["cache_salt"],
    )
    root = name = blake2b(scope, key=chain, person=b"kvf-root", digest_size=32).digest()
    size = case["block_size"]
    found = []
    for start in range(0, len(case["token_ids"]) // size * size, size):
        tokens = struct.pack(f"<{size}I", *case["token_ids"][start : start + size])
        name = blake2b(name + tokens, key=chain, person=b"kvf-block", digest_size=32).digest()
        found.append(name.hex())
    return {"chain_key": chain.hex(), "seal_key": seal.hex(), "root": root.hex(), "names": found}


def main():
    base = {
        "secret": bytes(range(32)).hex(),
        "tenant": "acme",
        "tenant_salt": bytes(range(100, 132)).hex(),
        "fingerprint": bytes(range(200, 232)).hex(),
        "layout_version": 1,
        "dtype": "bfloat16",
        "block_size": 4,
        "cache_salt": "",
        "token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9, 4294967295, 0, 151643, 77],
    }
    variants = [
        {},
        {"cache_salt": "session-1"},
        {"tenant": "a", "tenant_salt": b"bX".hex()},
        {"tenant": "ab", "tenant_salt": b"X".hex()},
        {"tenant": "acme-2"},
        {"tenant": "Zo\u00eb \u2708", "cache_salt": "\u96ea"},
        {"block_size": 16, "token_ids": list(range(1000, 1050))},
        {"dtype": "float32"},
        {"fingerprint": ""},
        {"token_ids": [1, 2, 3]},
        {"secret": b"a secret of another length".hex()},
    ]
    cases = [{**base, **variant} for variant in variants]
    path = Path(__file__).with_name("identity.json")
    path.write_text(json.dumps([{**case, "expect": names(case)} for case in cases], indent=1) + "\n")


if __name__ == "__main__":
    main()
