"""`kvferry certs`, as a person or a script runs it, and starts with certificates that are not right."""

import io
import json
import os
import re
import socket
import stat
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command_line import KVFERRY, kvferry
from trust_folder import Folder

from kvferry.cli import certs_folder
from kvferry.cli.certs_folder import make, next_trust, read_trust, renew
from kvferry.cli.main import app
from kvferry.common.certs import ROLES
from kvferry.common.credentials import load
from kvferry.common.errors import ConfigError

NOW = datetime.now(UTC)
YEAR = timedelta(days=365)
FILES = sorted(["ca.pem", "ca.key", "store.secret", *(f"{role}{end}" for role in ROLES for end in (".pem", ".key"))])


def called(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `kvferry certs`, in this process."""
    said, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(complained), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kvferry", "certs", *map(str, arguments)])
        code = app()
    return code, said.getvalue(), complained.getvalue()


def run(*arguments: object) -> str:
    code, said, complained = called(*arguments)
    assert (code, complained) == (0, "")
    return said


def refused(*arguments: object) -> str:
    code, said, complained = called(*arguments)
    assert (code, said, complained.count("\n")) == (2, "", 1), complained
    return complained.rstrip()


def rows(folder: Path, code: int = 0) -> dict[str, dict[str, str]]:
    """What `show` says of each role, with this exit code."""
    ended, said, complained = called("show", folder, "--json")
    assert (ended, complained) == (code, "")
    return {row["role"]: row for row in json.loads(said)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """As `init` makes it."""
    make(tmp_path / "certs", NOW, YEAR, 10 * YEAR)
    return tmp_path / "certs"


class TestInit:
    def test_what_is_made(self, tmp_path):
        folder = tmp_path / "new" / "certs"
        told = run("init", folder, "--days", "90", "--ca-days", "900")
        assert sorted(os.listdir(folder)) == FILES
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for name in FILES:
            assert stat.S_IMODE((folder / name).stat().st_mode) == (0o644 if name.endswith(".pem") else 0o600)
        assert re.fullmatch(rb"[0-9a-f]{64}\n", (folder / "store.secret").read_bytes())
        for role in ROLES:
            left = load(folder, role, NOW).expires - NOW
            assert timedelta(days=89, hours=23) < left < timedelta(days=90, hours=1)
            assert f"{role} ca.pem {role}.pem {role}.key" in re.sub(" +", " ", told)
        assert "ca.key stays there: who has it can be anybody" in told
        assert "store store.secret" in re.sub(" +", " ", told)

    def test_the_umask_has_no_say(self, tmp_path):
        command = f"umask 0; {KVFERRY} certs init {tmp_path}/certs"
        subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
        modes = {stat.S_IMODE((tmp_path / "certs" / name).stat().st_mode) for name in FILES}
        assert (modes, stat.S_IMODE((tmp_path / "certs").stat().st_mode)) == ({0o600, 0o644}, 0o700)

    def test_nothing_is_overwritten(self, folder):
        before = contents(folder)
        assert refused("init", folder) == (
            f"kvferry certs init: {folder} is not empty, there is ca.key; give a folder that is not there yet, or "
            f"renew certificates with `kvferry certs rotate {folder}`"
        )
        assert contents(folder) == before

    def test_an_empty_folder_of_ones_own_will_do(self, tmp_path):
        tmp_path.chmod(0o755)
        assert refused("init", tmp_path).endswith(f"where secrets are to be; run `chmod 700 {tmp_path}`")
        tmp_path.chmod(0o700)
        run("init", tmp_path)
        assert sorted(os.listdir(tmp_path)) == FILES

    def test_where_nothing_can_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        assert refused("init", tmp_path / "file").endswith("file cannot be made: File exists")
        assert refused("init", tmp_path / "file" / "x").endswith("x cannot be made: Not a directory")

    @pytest.mark.parametrize("there", [True, False])
    def test_what_fails_leaves_nothing_behind(self, there, tmp_path, monkeypatch):
        folder = tmp_path / "certs"
        if there:
            folder.mkdir(mode=0o700)
        real = certs_folder.write

        def full(path: Path, data: bytes) -> None:
            if path.name == "decode.pem":
                raise ConfigError(f"{path} cannot be written: No space left on device")
            real(path, data)

        monkeypatch.setattr(certs_folder, "write", full)
        with pytest.raises(ConfigError, match="No space left"):
            make(folder, NOW, YEAR, YEAR)
        assert folder.exists() == there
        assert not there or not os.listdir(folder)

    @pytest.mark.parametrize("days", ["0", "-1", "x"])
    def test_days(self, days, tmp_path):
        assert "--days" in refused("init", tmp_path / "certs", "--days", days)
        assert not (tmp_path / "certs").exists()


class TestRotate:
    def test_new_keys_under_the_same_ca(self, folder):
        before = contents(folder)
        told = run("rotate", folder, "--days", "30")
        after = contents(folder)
        assert sorted(after) == FILES
        assert {name for name in FILES if before[name] == after[name]} == {"ca.pem", "ca.key", "store.secret"}
        for role in ROLES:
            assert load(folder, role, NOW).expires < NOW + timedelta(days=31)
        assert "Running processes take the new files within seconds, and lose no request." in told

    def test_a_new_ca_and_then_the_end_of_the_old_one(self, folder, tmp_path):
        old = Folder(tmp_path / "host", "router").fill()
        for name in ("ca.pem", "router.pem", "router.key"):
            old.write(name, (folder / name).read_bytes())
        first = rows(folder)["ca"]["fingerprint"]
        told = run("rotate", folder, "--ca")
        assert f"end that with `kvferry certs rotate {folder} --drop-old-ca`" in told
        two = rows(folder)
        assert two["old ca"]["fingerprint"] == first != two["ca"]["fingerprint"]
        for _ in range(2):  # as it is, and once more renewed under the new CA
            for name in ("router.pem", "router.key"):
                old.write(name, (folder / name).read_bytes())
            assert load(old.path, "router", NOW), "a host that has heard nothing of the new CA yet"
            assert {one["state"] for one in rows(folder).values()} == {"valid"}
            run("rotate", folder)
        assert rows(folder)["ca"]["fingerprint"] == two["ca"]["fingerprint"]
        assert "still trusts the CA before this one" in refused("rotate", folder, "--ca")
        assert "lose no request" in run("rotate", folder, "--drop-old-ca")
        assert "old ca" not in rows(folder)
        assert sorted(os.listdir(folder)) == FILES
        for name in ("router.pem", "router.key"):
            old.write(name, (folder / name).read_bytes())
        with pytest.raises(ConfigError, match="was not issued by a CA"):
            load(old.path, "router", NOW)

    def test_a_new_ca_at_once(self, folder):
        first = rows(folder)["ca"]["fingerprint"]
        told = run("rotate", folder, "--ca", "--drop-old-ca", "--ca-days", "400")
        assert "start every process anew" in told
        assert "lose no request" not in told
        now = rows(folder)
        assert "old ca" not in now
        assert now["ca"]["fingerprint"] != first
        assert now["ca"]["in"] == "400 days"
        assert {one["state"] for one in now.values()} == {"valid"}

    def test_what_breaks_off_can_be_done_again(self, folder, monkeypatch):
        """Whichever file was the last that was written, all roles can go on, and the next rotation mends the rest."""
        real, names = certs_folder.write, []
        monkeypatch.setattr(certs_folder, "write", lambda path, data: names.append(path.name) or real(path, data))
        trust = next_trust(folder, read_trust(folder, NOW), NOW, YEAR, new_ca=True, drop_old_ca=False)
        before = contents(folder)
        renew(folder, trust, NOW, YEAR)
        order, after = list(names), contents(folder)
        assert len(order) == 11
        for written in range(len(order)):
            for name in {*before, *after}:
                (folder / name).unlink(missing_ok=True)
            for name, data in before.items():
                real(folder / name, data)
            for name in order[:written]:
                real(folder / name, after[name])
            roles = [role for role in ROLES if f"{role}.key" not in order[:written] or f"{role}.pem" in order[:written]]
            assert len(roles) >= len(ROLES) - 1
            for role in roles:
                load(folder, role, NOW)
            found = read_trust(folder, NOW)
            renew(folder, found, NOW, YEAR)
            for role in ROLES:
                load(folder, role, NOW)

    def test_a_ca_that_has_expired(self, tmp_path):
        folder, then = tmp_path / "certs", NOW - timedelta(days=20)
        make(folder, then, YEAR, timedelta(days=10))
        assert "expired at" in refused("rotate", folder)
        assert rows(folder, code=1)["ca"]["state"] == "expired"
        run("rotate", folder, "--ca")
        assert "old ca" not in rows(folder), "nobody trusts it any more"
        assert {one["state"] for one in rows(folder).values()} == {"valid"}

    def test_an_old_ca_that_has_expired_is_dropped(self, folder):
        trust = next_trust(folder, read_trust(folder, NOW), NOW, 20 * YEAR, new_ca=True, drop_old_ca=False)
        renew(folder, trust, NOW, YEAR)
        later = NOW + 11 * YEAR
        found = read_trust(folder, later)
        assert (found.older, found.bridge) == ([], [])
        renew(folder, found, later, YEAR)
        assert sorted(os.listdir(folder)) == FILES

    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            (lambda folder: (folder / "ca.key").unlink(), "there is no D/ca.key; rotate in the folder that"),
            (lambda folder: (folder / "ca.pem").unlink(), "there is no D/ca.pem"),
            (lambda folder: (folder / "ca.key").chmod(0o644), "D/ca.key is secret and others may read it; run `chmod"),
            (lambda folder: (folder / "ca.key").write_text("x"), "D/ca.key is not a key in PEM"),
            (lambda folder: (folder / "ca.pem").write_text("x"), "D/ca.pem holds no certificate in PEM"),
            (lambda folder: (folder / "router.key").replace(folder / "ca.key"), "D/ca.key is not the key of a CA"),
        ],
    )
    def test_what_cannot_be_rotated(self, folder, spoil, says):
        spoil(folder)
        before = contents(folder)
        assert refused("rotate", folder).replace(str(folder), "D").startswith(f"kvferry certs rotate: {says}")
        assert contents(folder) == before

    def test_no_folder(self, tmp_path):
        assert "is not a folder that can be read" in refused("rotate", tmp_path / "none")

    def test_owners_stay(self, folder):
        if os.geteuid() == 0:
            os.chown(folder / "router.key", 1234, 1235)
        before = (folder / "router.key").stat()
        run("rotate", folder)
        after = (folder / "router.key").stat()
        assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
        assert after.st_ino != before.st_ino


class TestShow:
    def test_a_table(self, folder):
        head, *lines = run("show", folder).splitlines()
        assert re.split("  +", head) == ["role", "file", "subject", "expires", "in", "fingerprint", "state"]
        assert [line.split()[0] for line in lines] == ["ca", *ROLES]
        assert all("365 days" in line and line.endswith("valid") for line in lines[1:])

    def test_what_one_host_has(self, tmp_path):
        host = Folder(tmp_path / "host", "prefill").fill()
        shown = rows(host.path)
        assert list(shown) == ["ca", "prefill"]
        told = subprocess.check_output(
            ["openssl", "x509", "-in", host.path / "prefill.pem", "-noout", "-fingerprint", "-sha256"], text=True
        )
        assert shown["prefill"]["fingerprint"] == told.partition("=")[2].strip().replace(":", "").lower()

    def test_what_cannot_be_used_says_why(self, tmp_path):
        host = Folder(tmp_path / "host", "decode").fill()
        (host.path / "decode.key").unlink()
        assert rows(host.path, code=1)["decode"]["state"].startswith("there is no ")
        host.put(host.issue(days=5, ago=9))
        assert rows(host.path, code=1)["decode"]["state"] == "expired"
        host.put(host.issue(days=1))
        told = rows(host.path)["decode"]
        assert (told["in"], told["state"]) == ("24 hours", "soon")
        host.put(host.issue(days=15))
        assert rows(host.path)["decode"]["state"] == "valid"

    def test_what_cannot_be_used_is_told_to_scripts_by_the_exit_code(self, tmp_path):
        host = Folder(tmp_path / "host", "decode").fill()
        for days, ago, code, state in ((90, 0, 0, "valid"), (5, 0, 0, "soon"), (5, 9, 1, "expired")):
            host.put(host.issue(days=days, ago=ago))
            told = called("show", host.path)
            assert (told[0], told[2]) == (code, "")
            assert told[1].splitlines()[-1].endswith(state)

    def test_nothing_there(self, tmp_path):
        assert "there is no" in refused("show", tmp_path)


class TestBadStarts:
    """Told in one line, before anything is started."""

    @pytest.fixture(params=["prefill", "decode", "router"])
    @staticmethod
    def start(request, tmp_path):
        """A role, its folder, and how it is started with that."""
        role = request.param
        host = Folder(tmp_path / "host", role).fill()
        command = ["router", "--model=/no/such", "--decode=10.0.0.1:9", "--port=0", "--admin-port=0", "--store=/s"]
        if role != "router":
            command = [role, "/no/such", f"--listen=0.0.0.0:{free_port()}", "--store=/s"]
        return role, host, [*command, f"--certs={host.path}"]

    def test_what_is_right_comes_as_far_as_the_model(self, start):
        role, _, command = start
        assert refusal(command) == f"kvferry {role}: there is no folder /no/such"

    def test_certificates_that_are_not(self, start):
        """One of what `load` refuses, all of which tests/common/test_credentials.py has."""
        role, host, command = start
        (host.path / f"{role}.key").chmod(0o640)
        assert refusal(command).startswith(f"kvferry {role}: {host.path}/{role}.key is secret and others may read it")

    def test_without_certificates_it_says_what_to_do(self, start):
        role, _, command = start
        told = refusal(command[:-1])
        assert told.startswith(f"kvferry {role}: ")
        assert "can be reached from other hosts, and tenant keys would cross the network in the clear" in told
        assert told.endswith("give --certs DIR, which `kvferry certs init DIR` makes, or use unix:/path or a loopback "
                             "address")  # fmt: skip

    @pytest.mark.parametrize("role", ["decode", "router"])
    @pytest.mark.parametrize("command", ["serve", "check-config"])
    def test_who_starts_all_of_them_looks_first(self, command, role, tmp_path):
        host = Folder(tmp_path / "host", role).fill()
        host.put(host.issue(days=5, ago=9))
        done = kvferry(command, "/no/such", "--port=0", "--admin-port=0", f"--{role}-arg=--certs={host.path}")
        assert done.returncode == 2
        assert f"{role}.pem expired at" in done.stderr


def refusal(command: list[str]) -> str:
    """The one line that a role says, as a process of its own, before it ends with exit code 2."""
    done = kvferry(*command)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr.rstrip()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
