"""Keys stand for tenants, and a file that could mislead is refused."""

import re

import pytest

from kvferry.common.errors import ConfigError, Unauthenticated
from kvferry.router.tenants import Tenants, new_file, read_file, with_key, without_key, write_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tenants.toml"


@pytest.fixture
def two(path):
    file, first = with_key(new_file(), "acme")
    file, second = with_key(file, "bolt.io")
    write_file(path, file)
    return path, first, second


def test_keys_stand_for_their_tenants(two):
    path, first, second = two
    tenants = Tenants.load(path)
    assert tenants.authenticate(f"Bearer {first}") == "acme"
    assert tenants.authenticate(f"bearer  {second} ") == "bolt.io"
    assert tenants.keys_of("acme") != tenants.keys_of("bolt.io")
    assert tenants.keys_of("acme") == Tenants.load(path).keys_of("acme")


def test_whatever_is_not_a_key_is_refused(two):
    path, first, second = two
    tenants = Tenants.load(path)
    swapped = first[:17] + second[17:]
    for header in (None, "", "Bearer", "Bearer ", f"Basic {first}", first, f"Bearer {first[:-1]}", f"Bearer {first}0",
                   f"Bearer {swapped}", f"Bearer kvf-{'0' * 12}-{'0' * 64}", f"Bearer kvf-{'1' * 12}-{first[17:]}",
                   f"Bearer {first.upper()}", "Bearer \u00e9", f"Bearer {first} x"):  # fmt: skip
        with pytest.raises(Unauthenticated) as refused:
            tenants.authenticate(header)
        assert first[20:] not in str(refused.value)


def test_a_line_cannot_be_edited_to_another_tenant(two):
    path, first, _ = two
    text = path.read_text()
    path.write_text(re.sub(r'(id = "[0-9a-f]+"\ntenant = )"acme"', r'\1"bolt.io"', text))
    assert path.read_text() != text
    with pytest.raises(Unauthenticated):
        Tenants.load(path).authenticate(f"Bearer {first}")


def test_the_file_keeps_no_secret_of_a_key(two):
    path, first, second = two
    text = path.read_text()
    assert first.rpartition("-")[2] not in text
    assert second.rpartition("-")[2] not in text
    assert path.stat().st_mode & 0o777 == 0o600


def test_revoked_keys_are_refused_and_the_tenant_stays(two):
    path, first, _ = two
    before = Tenants.load(path).keys_of("acme")
    write_file(path, without_key(read_file(path), first.split("-")[1]))
    tenants = Tenants.load(path)
    with pytest.raises(Unauthenticated):
        tenants.authenticate(f"Bearer {first}")
    assert tenants.keys_of("acme") == before
    with pytest.raises(ConfigError, match="there is no key"):
        without_key(read_file(path), "0123456789ab")


def test_a_tenant_made_again_shares_nothing(path):
    keys = set()
    file, _ = with_key(new_file(), "acme")
    for _ in range(2):
        write_file(path, file)
        keys.add(Tenants.load(path).keys_of("acme").chain)
        file, _ = with_key(type(file)(file.cluster_secret), "acme")
    assert len(keys) == 2


def test_second_key_of_a_tenant_opens_the_same_cache(two):
    path, first, _ = two
    file, third = with_key(read_file(path), "acme")
    before = Tenants.load(path).keys_of("acme")
    write_file(path, file)
    tenants = Tenants.load(path)
    assert tenants.authenticate(f"Bearer {first}") == tenants.authenticate(f"Bearer {third}") == "acme"
    assert tenants.keys_of("acme") == before


def test_without_a_file_everybody_is_one_tenant():
    tenants = Tenants.single()
    assert tenants.authenticate(None) == tenants.authenticate("Bearer anything") == "default"
    assert tenants.keys_of("default") != Tenants.single().keys_of("default")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_file_that_others_can_reach_is_refused(two, mode):
    path = two[0]
    path.chmod(mode)
    with pytest.raises(ConfigError, match="run `chmod 600 "):
        Tenants.load(path)


@pytest.mark.parametrize(
    ("pattern", "replacement", "says"),
    [
        (r'cluster_secret = "..', 'cluster_secret = "', "cluster_secret must have 64 hex digits"),
        (r"cluster_secret = .*", "", "cluster_secret"),
        (r'tenant_salt = "..', 'tenant_salt = "zz', "tenant_salt of acme must have 64 hex digits"),
        (r'tenant = "acme"', 'tenant = "nobody"', "belongs to 'nobody', which is not in"),
        (r'hmac = "..', 'hmac = "', "hmac of key"),
        (r'id = "..', 'id = "', "must have 12 hex digits"),
        (r'id = "[0-9a-f]*"', 'id = "aaaaaaaaaaaa"', "occur once"),
        (r'\[tenants."acme"\]', '[tenants."a/b"]', "'a/b' cannot be a tenant's name"),
        (r"tenant_salt = ", "tenant_slat = ", "tenant_slat"),
        (r"\[\[keys\]\]", "[[key]]", "key"),
        (r"cluster_secret = ", "cluster_secret ", "not valid"),
    ],
)
def test_a_faulty_file_is_refused_with_the_fault(two, pattern, replacement, says):
    path = two[0]
    text, changes = re.subn(pattern, replacement, path.read_text())
    assert changes
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        Tenants.load(path)
    assert "\n" not in str(refused.value)


def test_missing_and_unreadable_files(path, tmp_path):
    with pytest.raises(ConfigError, match="make one with `kvferry keys create TENANT"):
        Tenants.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tenants.load(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_file(tmp_path / "nowhere" / "tenants.toml", new_file())


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 65, 'a"b', ".a", "\u00e9"])
def test_names_that_are_refused(name):
    with pytest.raises(ConfigError, match="cannot be a tenant's name"):
        with_key(new_file(), name)


def test_secrets_are_not_in_any_repr(two):
    path, *_ = two
    file = read_file(path)
    assert file.cluster_secret not in repr(file)
