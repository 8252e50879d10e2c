"""Keys stand for tenants, a file that could mislead is refused, and a changed one is taken whole or not at all."""

import asyncio
import errno
import logging
import os
import re
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from kvferry.common.clock import ManualClock
from kvferry.common.errors import ConfigError, Unauthenticated
from kvferry.router import tenants as tenants_module
from kvferry.router.quota import TenantLimits
from kvferry.router.tenants import LiveTenants, Tenants
from kvferry.router.tenants_file import (
    TenantsFile,
    new_file,
    read_file,
    with_key,
    without_key,
    without_tenant,
    write_file,
)

NEW_YEAR = datetime(2027, 1, 1, tzinfo=UTC)


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
    assert tenants.authenticate(f"Bearer {first}").name == "acme"
    assert tenants.authenticate(f"bearer  {second} ").name == "bolt.io"
    assert tenants["acme"].keys != tenants["bolt.io"].keys
    assert tenants["acme"].keys == Tenants.load(path)["acme"].keys


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
    before = Tenants.load(path)["acme"].keys
    write_file(path, without_key(read_file(path), first.split("-")[1]))
    tenants = Tenants.load(path)
    with pytest.raises(Unauthenticated):
        tenants.authenticate(f"Bearer {first}")
    assert tenants["acme"].keys == before
    with pytest.raises(ConfigError, match="there is no key"):
        without_key(read_file(path), "0123456789ab")


def test_a_tenant_made_again_shares_nothing(path):
    keys = set()
    file, _ = with_key(new_file(), "acme")
    for _ in range(2):
        write_file(path, file)
        keys.add(Tenants.load(path)["acme"].keys.chain)
        file, _ = with_key(type(file)(file.cluster_secret), "acme")
    assert len(keys) == 2


def test_second_key_of_a_tenant_opens_the_same_cache(two):
    path, first, _ = two
    file, third = with_key(read_file(path), "acme")
    before = Tenants.load(path)["acme"].keys
    write_file(path, file)
    tenants = Tenants.load(path)
    assert tenants.authenticate(f"Bearer {first}") is tenants.authenticate(f"Bearer {third}") is tenants["acme"]
    assert tenants["acme"].keys == before


def test_without_a_file_everybody_is_one_tenant():
    tenants = Tenants.single()
    assert tenants.authenticate(None) is tenants.authenticate("Bearer anything") is tenants["default"]
    assert tenants["default"].keys != Tenants.single()["default"].keys


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
        (r'id = "..', 'id = "', "the id of key number 1 must have 12 hex digits"),
        (r'id = "[0-9a-f]*"', 'id = "aaaaaaaaaaaa"', "occur once"),
        (r'\[tenants."acme"\]', '[tenants."a/b"]', "'a/b' cannot be a tenant's name"),
        (r"tenant_salt = ", "tenant_slat = ", "tenant_slat"),
        (r"\[\[keys\]\]", "[[key]]", "key"),
        (r"cluster_secret = ", "cluster_secret ", "not valid"),
        (
            r"\Z",
            "[limits]\nrequests_per_min = 5\n",
            r"\[limits\] has 'requests_per_min'; did you mean requests_per_minute",
        ),
        (r"\Z", "[limits]\nx = 5\n", r"\[limits\] has 'x'; there are concurrent_requests, requests_per_minute, "),
        (r"\Z", "[limits]\nkv_blocks = 0\n", r"kv_blocks in \[limits\] is 0; it must be a whole number from 1 on"),
        (r"\Z", "[limits]\nkv_blocks = 1.5\n", r"kv_blocks in \[limits\] is 1.5; it must be a whole number"),
        (r"\Z", "[limits]\nkv_blocks = true\n", "Expected `int | float | str`, got `bool`"),
        (r"\Z", '[limits]\nkv_blocks = "none"\n', "kv_blocks in .limits. is 'none'; it must be a whole number from 1"),
        (r"\Z", "[limits]\nweight = nan\n", r"weight in \[limits\] is nan; it must be a number from 0.001 to 1000"),
        (r"\Z", '[limits]\nweight = "unlimited"\n', r"weight in \[limits\] is 'unlimited'; it must be a number"),
        (
            r'\[tenants."bolt',
            '[tenants."acme".limits]\nweight = 0\n[tenants."bolt',
            "weight in the limits of acme is 0; it must be",
        ),
        (
            r'\[tenants."bolt',
            '[tenants."acme".limits]\nweigth = 1\n[tenants."bolt',
            "the limits of acme has 'weigth'; did you mean weight",
        ),
        (r"\ncreated = .*Z|\ncreated = .*", "\nexpires = 2027-01-01T00:00:00", "expires of key .* has no time zone"),
        (r"\ncreated = .*", '\ncreated = "now"', "Invalid|Expected"),
        (r"\ncreated = .*", "\nexpires = 2027-01-01", "Expected"),
        (r'id = "[0-9a-f]*"', 'id = "kvf-0123456789ab-secret"', "the id of key number 1 must"),
    ],
)
def test_a_faulty_file_is_refused_with_the_fault(two, pattern, replacement, says):
    path = two[0]
    before = path.read_text()
    text, changes = re.subn(pattern, replacement, before)
    assert changes
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        Tenants.load(path)
    assert "\n" not in str(refused.value)
    secrets = [*re.findall(r"[0-9a-f]{50,}", before), "secret"]
    assert not [secret for secret in secrets if secret in str(refused.value).replace("cluster_secret", "")]


def test_missing_and_unreadable_files(path, tmp_path):
    with pytest.raises(ConfigError, match="make one with `kvferry keys create TENANT"):
        Tenants.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tenants.load(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_file(tmp_path / "nowhere" / "tenants.toml", new_file())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_changed_file_keeps_its_owner_and_mode(two):
    path, *_ = two
    os.chown(path, 1234, 4321)
    path.chmod(0o400)
    write_file(path, read_file(path))
    told = path.stat()
    assert (told.st_uid, told.st_gid, stat.S_IMODE(told.st_mode)) == (1234, 4321, 0o400)


def test_a_file_that_would_be_taken_from_its_owner_is_left_as_it_is(two, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    path, *_ = two
    before = path.read_bytes()
    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written: it belongs to user \d+ .* run this as that user"):
        write_file(path, with_key(read_file(path), "other")[0])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_one_and_its_file_changes(two, tmp_path):
    path, *_ = two
    link = tmp_path / "elsewhere" / "link.toml"
    link.parent.mkdir()
    link.symlink_to(path)
    write_file(link, with_key(read_file(link), "other")[0])
    assert link.is_symlink()
    assert "other" in read_file(path).tenants
    assert list(link.parent.iterdir()) == [link]


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 65, 'a"b', ".a", "\u00e9"])
def test_names_that_are_refused(name):
    with pytest.raises(ConfigError, match="cannot be a tenant's name"):
        with_key(new_file(), name)


def test_secrets_are_not_in_any_repr(two):
    path, *_ = two
    file = read_file(path)
    told = repr(file) + repr(file.tenants) + repr(Tenants.load(path)["acme"])
    assert file.cluster_secret not in told
    assert file.tenants["acme"].tenant_salt not in told


# -- keys that expire -------------------------------------------------------------------------------------------------


def test_a_key_is_good_until_it_expires(path):
    file, key = with_key(new_file(), "acme", NEW_YEAR)
    write_file(path, file)
    clock = ManualClock(NEW_YEAR.timestamp() - 0.001)
    tenants = Tenants.of(read_file(path), clock)
    assert tenants.authenticate(f"Bearer {key}").name == "acme"
    clock.advance(0.001)
    with pytest.raises(Unauthenticated, match="the API key expired at 2027-01-01 00:00 UTC; ask for another one"):
        tenants.authenticate(f"Bearer {key}")
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    with pytest.raises(Unauthenticated) as refused:
        tenants.authenticate(f"Bearer {wrong}")
    assert str(refused.value) == "the API key is not valid", "only who has the secret learns that there was such a key"


# -- limits -----------------------------------------------------------------------------------------------------------


def test_limits_are_the_default_ones_with_the_tenants_own_over_them(two):
    path = two[0]
    assert Tenants.load(path)["acme"].limits == TenantLimits()
    general = "[limits]\nrequests_per_minute = 600\nkv_blocks = 1_000\nweight = 0.5\n"
    own = '[tenants."acme".limits]\nrequests_per_minute = "unlimited"\nprompt_tokens = 77\nweight = 3\n'
    path.write_text(path.read_text() + general + own)
    for _ in range(2):
        tenants = Tenants.load(path)
        assert tenants["acme"].limits == TenantLimits(kv_blocks=1000, prompt_tokens=77, weight=3)
        assert tenants["bolt.io"].limits == TenantLimits(requests_per_minute=600, kv_blocks=1000, weight=0.5)
        assert tenants.limits == {name: tenants[name].limits for name in ("acme", "bolt.io")}
        write_file(path, with_key(read_file(path), "acme", NEW_YEAR)[0])


def test_what_is_written_is_what_was_read(two):
    path = two[0]
    path.write_text(path.read_text() + '[limits]\nweight = 1e-3\ntokens_per_minute = "unlimited"\n')
    file = with_key(read_file(path), "acme", NEW_YEAR)[0]
    write_file(path, file)
    assert read_file(path) == file
    assert file.keys[-1].expires == NEW_YEAR
    assert abs((file.keys[-1].created - datetime.now(UTC)).total_seconds()) < 60


def test_an_erased_tenant_leaves_nothing_behind(two):
    path, first, second = two
    file = read_file(path)
    salt = file.tenants["acme"].tenant_salt
    write_file(path, without_tenant(file, "acme"))
    assert salt not in path.read_text()
    assert "acme" not in path.read_text()
    tenants = Tenants.load(path)
    assert tenants.authenticate(f"Bearer {second}").name == "bolt.io"
    with pytest.raises(Unauthenticated):
        tenants.authenticate(f"Bearer {first}")
    with pytest.raises(ConfigError, match="there is no tenant 'acme'; `kvferry tenants list` shows"):
        without_tenant(read_file(path), "acme")


# -- a file that changes ----------------------------------------------------------------------------------------------


def look(live: LiveTenants) -> Tenants | None:
    """Two looks: a file is read when it stands still."""
    return live.look() or live.look()


def test_a_file_that_is_being_written_is_waited_for(two):
    path, first, _ = two
    live, text = LiveTenants(path), path.read_text()
    half = text.index("[[keys]]")
    for end in range(half, len(text), 20):
        path.write_text(text[:end])
        assert live.look() is None
    path.write_text(text)
    assert live.look() is None
    assert live.look().authenticate(f"Bearer {first}").name == "acme"


def test_a_file_that_was_cut_off_is_refused(two):
    path, *_ = two
    text = path.read_text()
    for end in range(len(text)):
        if not text[:end].endswith("\n"):
            path.write_text(text[:end])
            with pytest.raises(ConfigError, match="it was cut off, for it does not end with a newline"):
                read_file(path)


def test_a_changed_file_is_taken_whole(two):
    path, first, second = two
    live = LiveTenants(path)
    before = live.now
    assert look(live) is None
    write_file(path, without_key(read_file(path), first.split("-")[1]))
    found = look(live)
    assert live.now is before
    assert found.authenticate(f"Bearer {second}").name == "bolt.io"
    with pytest.raises(Unauthenticated):
        found.authenticate(f"Bearer {first}")
    assert live.look() is None


def break_off(path, text):
    path.write_text(text[: len(text) // 2])


FAULTS = {
    "cut": (break_off, "not valid"),
    "empty": (lambda path, text: path.write_text(""), "cut off"),
    "another file": (lambda path, text: path.write_text("[server]\nport = 1\n"), "unknown field `server`"),
    "binary": (lambda path, text: path.write_bytes(b"\xff\xfe" + text.encode()), "it is not UTF-8"),
    "readable by others": (lambda path, text: path.chmod(0o644), "run `chmod 600 "),
    "gone": (lambda path, text: path.unlink(), "there is no tenants file"),
    "a folder": (lambda path, text: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_changes_nothing_and_is_told_of_once(two, fault, caplog):
    path, first, _ = two
    damage, says = FAULTS[fault]
    text = path.read_text()
    live = LiveTenants(path)
    damage(path, text)
    with caplog.at_level(logging.INFO):
        assert [live.look() for _ in range(3)] == [None] * 3
        assert live.authenticate(f"Bearer {first}").name == "acme"
        assert len(caplog.messages) == 1
        assert says in caplog.messages[0]
        assert caplog.messages[0].endswith("; the tenants and keys of before stay as they are")
        assert "\n" not in caplog.messages[0]
        assert not [secret for secret in re.findall(r"[0-9a-f]{50,}", text) if secret in caplog.text]
        if path.is_dir():
            path.rmdir()
        path.write_text(text)
        path.chmod(0o600)
        assert look(live).authenticate(f"Bearer {first}").name == "acme"
        assert caplog.messages[1:] == ["the tenants file has changed: 2 tenants, 2 keys"]


def test_a_file_written_in_place_with_the_old_time_is_another(two):
    path, *_ = two
    live = LiveTenants(path)
    told = path.stat()
    salt = read_file(path).tenants["acme"].tenant_salt
    path.write_text(path.read_text().replace(salt, salt[::-1]))
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert look(live)["acme"] != live.now["acme"]


def test_watching_swaps_the_tenants_and_tells_of_them(two, monkeypatch):
    path, first, second = two
    monkeypatch.setattr(tenants_module, "LOOK_EVERY_S", 0.001)
    live = LiveTenants(path)
    acme = live.now["acme"].keys.pseudonym
    told: asyncio.Queue[Tenants] = asyncio.Queue()

    async def after(file: TenantsFile) -> frozenset[str]:
        write_file(path, file)
        assert await told.get() is live.now
        return live.now.pseudonyms

    async def main():
        watching = asyncio.create_task(live.watch(told.put_nowait))
        async with asyncio.timeout(10):
            file = read_file(path)
            assert acme in await after(without_key(file, second.split("-")[1]))
            assert acme not in await after(without_tenant(file, "acme"))
            assert acme not in await after(with_key(read_file(path), "acme")[0])
        watching.cancel()

    asyncio.run(main())
    with pytest.raises(Unauthenticated):
        live.authenticate(f"Bearer {first}")


def test_watching_waits_for_no_other_work(two, monkeypatch):
    """A revoked key is refused while every other thread is taken."""
    path, first, _ = two
    monkeypatch.setattr(tenants_module, "LOOK_EVERY_S", 0.001)
    live, told, go_on = LiveTenants(path), asyncio.Event(), threading.Event()

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        taken = [asyncio.create_task(asyncio.to_thread(go_on.wait)) for _ in range(9)]
        watching = asyncio.create_task(live.watch(lambda changed: told.set()))
        try:
            write_file(path, without_key(read_file(path), first.split("-")[1]))
            async with asyncio.timeout(10):
                await told.wait()
            with pytest.raises(Unauthenticated):
                live.authenticate(f"Bearer {first}")
        finally:
            go_on.set()
            await asyncio.gather(*taken)
            watching.cancel()

    asyncio.run(main())


def test_without_a_file_there_is_nothing_to_watch():
    live = LiveTenants(None)
    assert asyncio.run(live.watch(lambda *changed: None)) is None
    assert live.authenticate(None).name == "default"
