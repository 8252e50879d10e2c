"""Writes seal.json: sealed blocks worked out from DESIGN sections 4 and 5 alone, with hashlib, hmac and AES-256-GCM
written out (FIPS 197, SP 800-38D), and nothing of kvferry or of a library that it uses.

python tests/vectors/make_seal.py
"""

import json
from pathlib import Path

from make_identity import hkdf_sha256, lp

ROUNDS = 14  # of AES-256
R = 0xE1 << 120


def times_x(byte):
    return (byte << 1 ^ 0x1B) & 0xFF if byte & 0x80 else byte << 1


def s_box():
    """The inverse in GF(2^8), by way of powers of 3 and of its inverse 0xF6, then the affine map."""
    box, p, q = [0x63] * 256, 1, 1
    while True:
        p ^= times_x(p)
        q ^= q << 1
        q ^= q << 2
        q ^= q << 4
        q &= 0xFF
        q ^= 0x09 if q & 0x80 else 0
        rotated = [(q << n | q >> (8 - n)) & 0xFF for n in range(5)]
        box[p] = 0x63 ^ rotated[0] ^ rotated[1] ^ rotated[2] ^ rotated[3] ^ rotated[4]
        if p == 1:
            return box


S = s_box()


def round_keys(key):
    words = [list(key[i : i + 4]) for i in range(0, 32, 4)]
    constant = 1
    while len(words) < 4 * (ROUNDS + 1):
        word = words[-1]
        if len(words) % 8 == 0:
            word = [S[b] for b in word[1:] + word[:1]]
            word[0] ^= constant
            constant = times_x(constant)
        elif len(words) % 8 == 4:
            word = [S[b] for b in word]
        words.append([a ^ b for a, b in zip(words[-8], word, strict=True)])
    return [[byte for word in words[i : i + 4] for byte in word] for i in range(0, len(words), 4)]


def aes(keys, block):
    state = [a ^ b for a, b in zip(block, keys[0], strict=True)]
    for number, key in enumerate(keys[1:], 1):
        state = [S[state[(i + 4 * (i % 4)) % 16]] for i in range(16)]
        if number < ROUNDS:
            mixed = []
            for i in range(0, 16, 4):
                column = state[i : i + 4]
                every = column[0] ^ column[1] ^ column[2] ^ column[3]
                mixed += [b ^ every ^ times_x(b ^ column[(j + 1) % 4]) for j, b in enumerate(column)]
            state = mixed
        state = [a ^ b for a, b in zip(state, key, strict=True)]
    return bytes(state)


def ghash(subkey, data):
    total = 0
    for i in range(0, len(data), 16):
        x, total = total ^ int.from_bytes(data[i : i + 16].ljust(16, b"\0"), "big"), 0
        v = subkey
        for bit in range(127, -1, -1):
            total ^= v if x >> bit & 1 else 0
            v = v >> 1 ^ (R if v & 1 else 0)
    return total.to_bytes(16, "big")


def gcm(key, nonce, aad, data):
    """The ciphertext and the tag."""
    keys = round_keys(key)
    stream = b"".join(aes(keys, nonce + n.to_bytes(4, "big")) for n in range(1, 2 + -(-len(data) // 16)))
    sealed = bytes(a ^ b for a, b in zip(data, stream[16:], strict=False))
    padded = b"".join(part + bytes(-len(part) % 16) for part in (aad, sealed))
    lengths = (8 * len(aad)).to_bytes(8, "big") + (8 * len(sealed)).to_bytes(8, "big")
    hashed = ghash(int.from_bytes(aes(keys, bytes(16)), "big"), padded + lengths)
    return sealed, bytes(a ^ b for a, b in zip(hashed, stream[:16], strict=True))


def sealed(case):
    seal_key, name, parent, salt, data = (
        bytes.fromhex(case[field]) for field in ("seal_key", "name", "parent", "salt", "plain")
    )
    key = hkdf_sha256(seal_key, lp(name, salt))
    aad = lp("kvferry/block", name, parent, len(data), case["segments"], salt)
    size = len(data) // case["segments"]
    parts = [gcm(key, i.to_bytes(12, "big"), aad, data[i * size : (i + 1) * size]) for i in range(case["segments"])]
    told = {"key": key, "aad": aad, "sealed": b"".join(s for s, _ in parts), "tags": b"".join(t for _, t in parts)}
    return {field: value.hex() for field, value in told.items()}


def main():
    base = {
        "seal_key": bytes(range(32)).hex(),
        "name": bytes(range(32, 64)).hex(),
        "parent": bytes(range(64, 96)).hex(),
        "salt": bytes(range(96, 112)).hex(),
        "segments": 2,
        "plain": bytes(i * 7 % 256 for i in range(64)).hex(),
    }
    variants = [
        {},
        {"seal_key": bytes(range(1, 33)).hex()},
        {"name": bytes(range(33, 65)).hex()},
        {"parent": bytes(range(65, 97)).hex()},
        {"salt": bytes(range(97, 113)).hex()},
        {"segments": 1},
        {"segments": 8},
        {"segments": 3, "plain": bytes(range(60)).hex()},
    ]
    cases = [{**base, **variant} for variant in variants]
    path = Path(__file__).with_name("seal.json")
    path.write_text(json.dumps([{**case, "expect": sealed(case)} for case in cases], indent=1) + "\n")


if __name__ == "__main__":
    main()
