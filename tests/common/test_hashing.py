"""Identity: equal names mean equal prefixes in equal scopes, and our values are those another implementation gets."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.common.block import LAYOUT_VERSION, BlockLayout
from kvferry.common.hashing import SEGMENT, CacheScope, Span, TenantKeys, derive_key, length_prefixed

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "identity.json").read_text())
SECRET = b"s" * 32
SALT = b"t" * 32


def layout(block_size=4, dtype="bfloat16"):
    return BlockLayout(kv_heads=2, layers=1, block_size=block_size, head_dim=8, dtype=dtype)


def scope(tenant="acme", salt=SALT, **changes):
    return CacheScope(TenantKeys.derive(SECRET, tenant, salt), b"f" * 32, layout(), **changes)


@pytest.mark.parametrize("case", VECTORS, ids=range(len(VECTORS)))
def test_values_agree_with_an_independent_implementation(case):
    assert case["layout_version"] == LAYOUT_VERSION, "the layout version changed: run tests/vectors/make_identity.py"
    secret, salt = bytes.fromhex(case["secret"]), bytes.fromhex(case["tenant_salt"])
    expect = case["expect"]
    keys = TenantKeys.derive(secret, case["tenant"], salt)
    assert keys.chain.hex() == expect["chain_key"]
    assert keys.seal.hex() == expect["seal_key"]
    assert derive_key(secret, "seal", case["tenant"], salt).hex() == expect["seal_key"]
    fingerprint = bytes.fromhex(case["fingerprint"])
    cache = CacheScope(keys, fingerprint, layout(case["block_size"], case["dtype"]), case["cache_salt"])
    assert cache.root().hex() == expect["root"]
    assert [name.hex() for name in cache.chain(case["token_ids"])] == expect["names"]


def test_no_two_vectors_share_a_name():
    # Vector 9 is a prefix of the first that is shorter than a block, so it has the same root and no names.
    names = [name for case in VECTORS for name in case["expect"]["names"]]
    assert len(set(names)) == len(names)


TOKENS = list(range(20))


def test_where_tenant_and_salt_are_cut_matters():
    assert derive_key(SECRET, "chain", "a", b"bX") != derive_key(SECRET, "chain", "ab", b"X")


@pytest.mark.parametrize(
    "other",
    [
        scope(tenant="other"),
        scope(salt=b"u" * 32),
        scope(cache_salt="one"),
        scope(cache_salt="two"),
        dataclasses.replace(scope(), fingerprint=b"g" * 32),
        dataclasses.replace(scope(), layout=layout(dtype="float16")),
    ],
)
def test_another_scope_shares_no_name(other):
    assert not set(scope().chain(TOKENS)) & set(other.chain(TOKENS))
    assert scope().root() != other.root()


def test_two_cache_salts_share_no_name():
    assert not set(scope(cache_salt="one").chain(TOKENS)) & set(scope(cache_salt="two").chain(TOKENS))


def test_a_tenant_made_again_has_another_pseudonym():
    assert scope().keys.pseudonym != scope(salt=b"u" * 32).keys.pseudonym


def test_keys_stay_out_of_reprs():
    assert scope().keys.chain.hex() not in repr(scope())
    assert repr(scope().keys.chain) not in repr(scope())


@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=40), cut=st.integers(0, 10))
def test_chain(tokens, cut):
    """Only whole blocks have names, a chain continues from any of its blocks, and a prefix has a prefix's names."""
    cache = scope()
    names = cache.chain(tokens)
    assert len(names) == len(tokens) // 4
    cut = min(cut, len(names))
    parent = names[cut - 1] if cut else cache.root()
    assert cache.chain(tokens[cut * 4 :], parent) == names[cut:]
    assert cache.chain(tokens[: cut * 4]) == names[:cut]


@given(tokens=st.lists(st.integers(0, 1000), min_size=8, max_size=24), at=st.integers(0, 23))
def test_a_changed_token_renames_its_block_and_all_after_it(tokens, at):
    at %= len(tokens)
    changed = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
    before, after = scope().chain(tokens), scope().chain(changed)
    assert before[: at // 4] == after[: at // 4]
    assert not set(before[at // 4 :]) & set(after[at // 4 :])


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_outside_u32_is_refused(token):
    with pytest.raises(OverflowError):
        scope().chain([token] * 4)


FIELD = st.text(max_size=6) | st.binary(max_size=6) | st.integers(-(2**63), 2**63 - 1)
FIELDS = st.lists(FIELD, max_size=4)


def typed(fields):
    return [(type(field), field) for field in fields]


@settings(max_examples=300)
@given(one=FIELDS, two=FIELDS)
def test_length_prefixed_is_injective(one, two):
    assert (length_prefixed(*one) == length_prefixed(*two)) == (typed(one) == typed(two))


@given(FIELDS)
def test_length_prefixed_can_be_read_back(fields):
    data, read = length_prefixed(*fields), []
    while data:
        kind, size = data[:1], int.from_bytes(data[1:5], "little")
        value, data = data[5 : 5 + size], data[5 + size :]
        read.append(
            {b"s": bytes.decode, b"b": bytes, b"i": lambda v: int.from_bytes(v, "little", signed=True)}[kind](value)
        )
    assert typed(read) == typed(fields)


@pytest.mark.parametrize("value", [True, 1.5, None])
def test_length_prefixed_takes_no_other_type(value):
    with pytest.raises(TypeError):
        length_prefixed(value)


def test_spans_know_where_they_lie():
    names = [bytes([i]) * 32 for i in range(150)]
    root = b"r" * 32
    whole = Span.of(names, root)
    assert (whole.first, whole.parent, whole.anchor, len(whole)) == (0, root, names[0], 150)
    assert whole.anchors() == [names[i // SEGMENT * SEGMENT] for i in range(150)]
    for first, end in ((0, 1), (1, 64), (63, 65), (64, 150), (70, 70), (100, 140), (149, 150)):
        part = Span.of(names, root, first, end)
        assert part.names == tuple(names[first:end])
        assert part.parent == (names[first - 1] if first else root)
        assert part.anchors() == whole.anchors(first, end)
        for offset in range(len(part)):
            assert part.from_(offset) == Span.of(names, root, first + offset, end)
            assert part.from_(offset, offset + 1) == Span.of(names, root, first + offset, first + offset + 1)
