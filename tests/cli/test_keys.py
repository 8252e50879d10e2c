"""`kvferry keys` and `kvferry tenants` as a person or a script meets them: real processes."""

import fcntl
import json
import os
import pty
import re
import stat
import subprocess
import sysconfig
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kvferry.cli.keys import expiry
from kvferry.cli.tenants import alone
from kvferry.common.errors import ConfigError
from kvferry.router.tenants import Tenants
from kvferry.router.tenants_file import read_file

KVFERRY = Path(sysconfig.get_path("scripts")) / "kvferry"
NOW = datetime(2026, 1, 1, 12, 30, 15, 99, tzinfo=UTC)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tenants.toml"


@pytest.fixture
def kvferry(path):
    """Runs a command on the file, with nothing to read from."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [KVFERRY, *arguments, "--tenants-file", path]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
        )

    return run


def on_a_terminal(*command: object, answer: str = "") -> tuple[int, str]:
    """The exit code, and what is shown on a terminal of 120 columns by a command that is given an answer."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [KVFERRY, *map(str, command)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    os.write(ours, answer.encode())
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # EIO: the process has closed its end
            break
    os.close(ours)
    return process.wait(timeout=60), re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())


def test_keys_from_first_to_last(kvferry, path):
    made = kvferry("keys", "create", "acme")
    key = made.stdout.strip()
    assert (made.returncode, made.stderr) == (0, "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Tenants.load(path).authenticate(f"Bearer {key}").name == "acme"
    key_id = key.split("-")[1]
    names, row = kvferry("keys", "list").stdout.splitlines()
    assert names.split() == ["id", "tenant", "created", "expires", "state"]
    assert re.fullmatch(rf"{key_id}  acme    \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ  -        valid", row)
    assert [row.index(one) for one in ("acme", "-  ", "valid")] == [
        names.index(one) for one in ("tenant", "expires", "state")
    ]
    tenants = kvferry("tenants", "list").stdout.splitlines()
    assert [line.split()[i] for line in tenants for i in (0, 2)] == ["tenant", "keys", "acme", "1"]
    revoked = kvferry("keys", "revoke", key_id)
    assert (
        revoked.stdout
        == f"{key_id} is revoked; running routers refuse it within 2 s, and finish what it has under way\n"
    )
    assert kvferry("keys", "list").stdout == ""
    again = kvferry("keys", "revoke", key_id)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"kvferry keys revoke: there is no key {key_id}; `kvferry keys list` shows those there are\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_whole_key_can_be_revoked_and_none_is_shown(kvferry, path):
    key, other = (kvferry("keys", "create", "acme").stdout.strip() for _ in range(2))
    refused = kvferry("keys", "revoke", key + "0")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "kvferry keys revoke: this is no key's id; give the 12 hex digits in the middle of kvf-ID-SECRET, which "
        "`kvferry keys list` shows\n"
    )
    revoked = kvferry("keys", "revoke", key)
    assert (revoked.returncode, key.split("-")[2] in revoked.stdout + revoked.stderr) == (0, False)
    assert [line.id for line in read_file(path).keys] == [other.split("-")[1]]


SECRET = "0123456789abcdef" * 4
PASTED = {
    "a key": f"kvf-0123456789ab-{SECRET}",
    "its secret": SECRET,
    "a key cut short": f"kvf-0123456789ab-{SECRET[:40]}",
    "a key cut shorter": "kvf-0123456789ab",
    "a key and more": f"kvf-0123456789ab-{SECRET}00",
    "its beginning gone": f"89ab-{SECRET}",
    "in capitals": f"KVF-0123456789AB-{SECRET.upper()}",
}


@pytest.mark.parametrize("pasted", PASTED.values(), ids=PASTED)
def test_a_key_that_is_pasted_where_a_name_belongs_is_refused_and_not_repeated(kvferry, path, pasted):
    kvferry("keys", "create", "acme")
    before = path.read_text()
    for command in (
        ("keys", "create", pasted),
        ("tenants", "erase", pasted, "--yes"),
        ("keys", "revoke", pasted + "x"),
        ("keys", "create", "acme", "--expires", pasted),
        ("keys", "revoke", "0123456789ab", pasted),
        ("keys", pasted),
    ):
        refused = kvferry(*command)
        assert (refused.returncode, refused.stdout) == (2, ""), command
        assert not re.search("[0-9a-f]{24}", refused.stderr, re.IGNORECASE), command
    assert path.read_text() == before


def test_names_that_look_a_little_like_a_key_are_names(kvferry):
    for name in ("kvf-team", "kvf", "0123456789ab", "3f2504e04f8941d39a0c0305e82c3301"):
        assert kvferry("keys", "create", name).returncode == 0


def test_changes_by_a_link_wait_for_those_of_its_file(path, tmp_path):
    link = tmp_path / "elsewhere" / "link.toml"
    link.parent.mkdir()
    link.symlink_to(path)
    folder = os.open(path.parent, os.O_RDONLY)
    with alone(link), pytest.raises(BlockingIOError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def test_json_is_complete(kvferry, path):
    made = json.loads(kvferry("keys", "create", "acme", "--expires", "2099-01-31T00:00Z", "--json").stdout)
    assert Tenants.load(path).authenticate(f"Bearer {made['key']}").name == "acme"
    assert made["key"].startswith(f"kvf-{made['id']}-")
    assert (made["tenant"], made["expires"]) == ("acme", "2099-01-31T00:00:00Z")
    path.write_text(path.read_text() + '[limits]\nkv_blocks = 9\n[tenants."acme".limits]\nweight = 2.5\n')
    (listed,) = json.loads(kvferry("keys", "list", "--json").stdout)
    assert listed.pop("created") == read_file(path).keys[0].created.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert listed == {"id": made["id"], "tenant": "acme", "expires": made["expires"], "state": "valid"}
    assert json.loads(kvferry("tenants", "list", "--json").stdout) == [
        {
            "tenant": "acme",
            "pseudonym": Tenants.load(path)["acme"].keys.pseudonym,
            "keys": 1,
            "limits": {"kv_blocks": 9, "weight": 2.5},
        }
    ]


def test_a_key_that_has_expired_is_shown_as_such(kvferry, path):
    key = kvferry("keys", "create", "acme", "--expires", "1h").stdout.strip()
    path.write_text(re.sub(r"expires = \d{4}", "expires = 2001", path.read_text()))
    assert [key["state"] for key in json.loads(kvferry("keys", "list", "--json").stdout)] == ["expired"]
    assert key not in kvferry("keys", "list").stdout


def test_keys_made_at_once_are_all_kept(path):
    command = [KVFERRY, "keys", "create", "acme", "--tenants-file", path]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    keys = [process.communicate(timeout=60)[0].strip() for process in running]
    tenants = Tenants.load(path)
    assert [tenants.authenticate(f"Bearer {key}").name for key in keys] == ["acme"] * 6


def test_erasing_asks_or_is_told_not_to(kvferry, path):
    for name in ("acme", "acme", "bolt"):
        kvferry("keys", "create", name)
    before = path.read_text()
    refused = kvferry("tenants", "erase", "acme")
    assert refused.returncode == 2
    assert refused.stderr == (
        "kvferry tenants erase: this cannot be undone; to erase acme without being asked, give --yes\n"
    )
    assert path.read_text() == before
    erased = kvferry("tenants", "erase", "acme", "--yes")
    assert erased.stdout == (
        "acme is erased; running routers refuse its keys within 2 s and end what it has under way\n"
    )
    assert [tenant["tenant"] for tenant in json.loads(kvferry("tenants", "list", "--json").stdout)] == ["bolt"]
    assert [key["tenant"] for key in json.loads(kvferry("keys", "list", "--json").stdout)] == ["bolt"]
    again = kvferry("tenants", "erase", "acme", "--yes")
    assert again.returncode == 2
    assert again.stderr.endswith("there is no tenant 'acme'; `kvferry tenants list` shows those there are\n")


def test_on_a_terminal_there_are_tables_and_a_question(kvferry, path):
    key = kvferry("keys", "create", "acme").stdout.strip()
    at = ("--tenants-file", path)
    code, shown = on_a_terminal("keys", "list", *at)
    assert code == 0
    assert key.split("-")[1] in shown
    assert {"id", "tenant", "created", "expires", "state"} <= set(re.findall(r"\w+", shown))
    code, shown = on_a_terminal("tenants", "list", *at)
    assert code == 0
    assert Tenants.load(path)["acme"].keys.pseudonym in shown
    code, shown = on_a_terminal("tenants", "erase", "acme", *at, answer="n\n")
    assert code != 0
    assert "Erase acme, with its keys and all it has cached? It cannot be undone." in shown
    assert "acme" in read_file(path).tenants
    code, shown = on_a_terminal("tenants", "erase", "acme", *at, answer="y\n")
    assert code == 0
    assert not read_file(path).tenants
    assert "nothing yet" in on_a_terminal("tenants", "list", *at)[1]
    code, shown = on_a_terminal("keys", "create", "acme", *at)
    assert "Keep it: it is shown this once." in shown


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("1h", NOW + timedelta(hours=1)),
        ("30d", NOW + timedelta(days=30)),
        ("4w", NOW + timedelta(days=28)),
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-31T10:00", datetime(2027, 1, 31, 10, tzinfo=UTC)),
        ("2027-01-31T10:00:30+02:00", datetime(2027, 1, 31, 8, 0, 30, tzinfo=UTC)),
    ],
)
def test_when_a_key_expires(text, when):
    assert expiry(text, NOW) == when.replace(microsecond=0)


@pytest.mark.parametrize("text", ["", "0d", "5", "d", "5y", "-3d", "soon", "2025-01-01", "2026-13-01", "9999999d"])
def test_times_that_are_refused(text):
    with pytest.raises(ConfigError, match=r"--expires .* (is no time; write it like 12h|is over already)"):
        expiry(text, NOW)


def test_a_wrong_time_makes_no_file(kvferry, path):
    refused = kvferry("keys", "create", "acme", "--expires", "soon")
    assert refused.returncode == 2
    assert refused.stderr == (
        "kvferry keys create: --expires 'soon' is no time; write it like 12h, 30d, 4w or 2027-01-31T00:00Z\n"
    )
    assert not path.exists()


@pytest.mark.parametrize("command", ["keys create", "keys list", "keys revoke", "tenants list", "tenants erase"])
def test_every_help_has_an_example(kvferry, command):
    shown = kvferry(*command.split(), "--help")
    assert shown.returncode == 0
    assert f"Example: kvferry {command}" in shown.stdout
