"""The files of one process: checked when they are loaded, and taken anew when they have changed."""

import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from trust_folder import Folder

from kvferry.common import certs
from kvferry.common.clock import ManualClock
from kvferry.common.credentials import LiveCredentials, load
from kvferry.common.errors import ConfigError

NOW = datetime.now(UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Those of a router."""
    return Folder(tmp_path, "router").fill()


def refusal(folder: Folder, now: datetime = NOW) -> str:
    with pytest.raises(ConfigError) as refused:
        load(folder.path, "router", now)
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(str(folder.path), "D")


class TestLoad:
    def test_what_is_right(self, folder):
        found = load(folder.path, "router", NOW)
        assert found.role == "router"
        assert found.chain == (folder.path / "router.pem").read_bytes()
        assert found.expires > NOW
        assert "PRIVATE" not in repr(found)

    @pytest.mark.parametrize("name", ["ca.pem", "router.pem", "router.key"])
    def test_a_file_that_is_not_there(self, folder, name):
        (folder.path / name).unlink()
        assert refusal(folder).startswith(f"there is no D/{name}; `kvferry certs init` makes it")

    def test_a_folder_that_is_none(self, folder, tmp_path):
        with pytest.raises(ConfigError, match=r"router\.pem/ca\.pem cannot be read: Not a directory"):
            load(folder.path / "router.pem", "router", NOW)

    @pytest.mark.parametrize("name", ["ca.pem", "router.pem"])
    def test_what_is_no_certificate(self, folder, name):
        (folder.path / name).write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        assert refusal(folder) == f"D/{name} holds no certificate in PEM"

    def test_what_is_no_key(self, folder):
        folder.write("router.key", b"")
        assert refusal(folder).startswith(
            "D/router.key is not a key in PEM; copy ca.pem, router.pem and router.key anew"
        )

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660])
    def test_a_key_that_others_may_read(self, folder, mode):
        (folder.path / "router.key").chmod(mode)
        assert refusal(folder) == "D/router.key is secret and others may read it; run `chmod 600 D/router.key`"

    def test_a_key_that_may_not_be_read(self, folder, monkeypatch):
        """Of somebody else; root may read all, so who opens it says so here."""
        if os.geteuid() != 0:
            (folder.path / "router.key").chmod(0)
        else:

            def refusing(path, *args):
                if str(path).endswith(".key"):
                    raise PermissionError(13, "Permission denied", str(path))
                return open(path, *args)

            monkeypatch.setattr("kvferry.common.credentials.open", refusing, raising=False)
        assert refusal(folder) == "D/router.key cannot be read: Permission denied"

    def test_the_key_of_another_certificate(self, folder):
        folder.write("router.key", certs.key_to_pem(folder.issue().key))
        assert refusal(folder).startswith("D/router.key is not the key of D/router.pem; copy")

    def test_another_role(self, folder):
        folder.put(folder.issue("decode"))
        assert refusal(folder).startswith("D/router.pem is the certificate of decode, not of router; copy")

    def test_no_role(self, folder):
        folder.put(certs.Leaf(folder.ca.certificate, folder.ca.key))
        assert refusal(folder).startswith("D/router.pem is the certificate of no role, not of router; copy")

    def test_another_ca(self, folder):
        folder.write("ca.pem", certs.to_pem([certs.new_authority(NOW).certificate]))
        assert refusal(folder).startswith("D/router.pem was not issued by a CA of D/ca.pem; copy")

    def test_a_new_ca_that_the_old_one_vouches_for(self, folder):
        new = certs.new_authority(NOW)
        folder.put(certs.issue(new, "router", NOW), certs.vouch(folder.ca, new, NOW))
        assert load(folder.path, "router", NOW)

    def test_dates(self, folder):
        until = load(folder.path, "router", NOW).expires
        told = refusal(folder, until)
        assert told.startswith(f"D/router.pem expired at {until:%Y-%m-%d %H:%M} UTC; run `kvferry certs rotate`")
        assert load(folder.path, "router", until - timedelta(seconds=1))
        early = NOW - timedelta(hours=1, seconds=1)
        assert "is valid from" in refusal(folder, early)
        assert f"and it is {early:%Y-%m-%d %H:%M} UTC here; set the clock" in refusal(folder, early)


class TestLive:
    @pytest.fixture
    @staticmethod
    def clock() -> ManualClock:
        return ManualClock(NOW.timestamp())

    @pytest.fixture
    @staticmethod
    def live(folder, clock) -> LiveCredentials:
        return LiveCredentials(folder.path, "router", clock)

    def test_nothing_changes(self, live):
        assert [live.look() for _ in range(3)] == [None] * 3

    def test_what_stands_still_between_two_looks_is_taken(self, live, folder):
        before = live.now.chain
        folder.put(folder.issue())
        assert live.look() is None, "it may still be written"
        found = live.look()
        assert found.chain == (folder.path / "router.pem").read_bytes() != before
        assert live.look() is None

    def test_what_is_still_written_is_not(self, live, folder):
        for _ in range(3):
            folder.put(folder.issue())
            assert live.look() is None

    def test_half_of_a_change_is_not_taken_and_told_once(self, live, folder, caplog):
        leaf = folder.issue()
        folder.write("router.key", certs.key_to_pem(leaf.key))
        assert [live.look() for _ in range(4)] == [None] * 4
        (told,) = caplog.records
        assert "router.key is not the key of" in told.getMessage()
        assert told.getMessage().endswith("; the certificate of before stays in use")
        assert live.fault == told.getMessage().removesuffix("; the certificate of before stays in use")
        folder.write("router.pem", certs.to_pem([leaf.certificate]))
        assert [bool(live.look()) for _ in range(2)] == [False, True]
        assert live.fault == ""

    def test_a_file_that_was_gone_for_a_while_is_no_fault_any_more(self, live, folder, monkeypatch):
        """Also where the system does not tell that it was."""
        there = live._signature()
        (folder.path / "router.key").rename(folder.path / "elsewhere")
        assert [live.look() for _ in range(3)] == [None] * 3
        assert live.fault.startswith("there is no ")
        monkeypatch.setattr(live, "_signature", lambda: there)
        assert live.look() is None
        assert live.fault == ""

    def test_a_ca_that_nobody_vouches_for_is_warned_of(self, live, folder, caplog):
        """One that the old CA vouches for is not, nor the end of the old one: nobody is refused then."""
        old, then = folder.ca, NOW - timedelta(hours=1)

        def warnings() -> list[str]:
            live.look()
            if (found := live.look()) is not None:
                live.now = found
            told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            caplog.clear()
            return told

        new = certs.new_authority(then)
        folder.ca = new
        folder.trust(new, old)
        folder.put(folder.issue(), certs.vouch(old, new, NOW))
        assert warnings() == []
        folder.trust(new)
        folder.put(folder.issue())
        assert warnings() == []
        folder.ca = certs.new_authority(then)
        folder.fill()
        (told,) = warnings()
        assert "for which that of before does not vouch" in told
        assert live.now.chain == (folder.path / "router.pem").read_bytes(), "it is taken all the same"

    def test_a_file_that_is_gone_changes_nothing(self, live, folder):
        (folder.path / "ca.pem").unlink()
        assert [live.look() for _ in range(3)] == [None] * 3
        folder.fill()
        assert [bool(live.look()) for _ in range(2)] == [False, True]

    def test_an_expired_one_in_its_place_is_not_taken(self, live, folder, caplog):
        folder.put(certs.issue(folder.ca, "router", NOW - timedelta(days=9), timedelta(days=1)))
        assert [live.look() for _ in range(3)] == [None] * 3
        assert "expired at" in caplog.text

    def test_the_end_is_told_of_in_time_once_a_day(self, folder, clock, caplog):
        caplog.set_level(logging.WARNING)
        folder.put(certs.issue(folder.ca, "router", NOW, timedelta(days=20)))
        live = LiveCredentials(folder.path, "router", clock)
        told = []
        for _ in range(25 * 24):
            live.warn()
            told += [(clock.now() - NOW.timestamp(), record.getMessage()) for record in caplog.records]
            caplog.clear()
            clock.advance(3600)
        days = [seconds / 86400 for seconds, _ in told]
        assert 6 <= days[0] < 6.1
        assert days == pytest.approx([days[0] + number for number in range(len(days))])
        assert len(days) == 19
        assert ["expired at" in sentence for _, sentence in told] == [day >= 20 for day in days]
        folder.put(folder.issue())
        live.now = load(folder.path, "router", NOW)
        live.warn()
        assert not caplog.records
