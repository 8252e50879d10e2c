"""A process's own certificate, and whom it trusts, as they lie in the folder that `--certs` names.

    ca.pem              the CAs that are trusted: the one that issues now, first, and perhaps the one before it
    ROLE.pem ROLE.key   the certificate of this process's role, with what it brings along, and its key

A running process looks at its files every second and takes changed ones, once they have stood still between two looks
and belong together. They count for connections made from then on; those that are open stay open.
"""

import asyncio
import logging
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from kvferry.common import certs
from kvferry.common.clock import Clock, WallClock
from kvferry.common.errors import ConfigError

CA_FILE = "ca.pem"
LOOK_EVERY_S = 1.0
WARN = timedelta(days=14)  # before a certificate expires, and from then on once a day
WARN_EVERY_S = 86400.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one role shows and trusts, as PEM."""

    role: str
    roots: bytes
    chain: bytes
    key: bytes = field(repr=False)
    expires: datetime


def certificate_file(role: str) -> str:
    return f"{role}.pem"


def key_file(role: str) -> str:
    return f"{role}.key"


def files_of(role: str) -> tuple[str, str, str]:
    """What a role needs."""
    return CA_FILE, certificate_file(role), key_file(role)


def load(folder: Path, role: str, now: datetime) -> Credentials:
    """A role's credentials, checked as far as they can be without a peer. Raises ConfigError with what to do."""
    ca_path, path, key_path = (folder / name for name in files_of(role))
    roots, chain, key = read(ca_path), read(path), read(key_path)
    certificates = certificates_in(path, chain)
    leaf = certificates[0]
    if (named := certs.role_of(leaf)) != role:
        raise ConfigError(f"{path} is the certificate of {named or 'no role'}, not of {role}; {_copy(role)}")
    try:
        fits = certs.fits(certs.key_from_pem(key), leaf)
    except ValueError:
        raise ConfigError(f"{key_path} is not a key in PEM; {_copy(role)}") from None
    if not fits:
        raise ConfigError(f"{key_path} is not the key of {path}; {_copy(role)}")
    if not certs.trusted(certificates, certificates_in(ca_path, roots)):
        raise ConfigError(f"{path} was not issued by a CA of {ca_path}; {_copy(role)}")
    check_dates(path, leaf, now)
    return Credentials(role, roots, chain, key, leaf.not_valid_after_utc)


def read(path: Path) -> bytes:
    """The bytes of a file; those of a key only if nobody else can read it. Raises ConfigError."""
    try:
        with open(path, "rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read()
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}; `kvferry certs init` makes it and tells which files go where") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".key" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path} is secret and others may read it; run `chmod 600 {path}`")
    return data


def certificates_in(path: Path, data: bytes) -> Sequence[x509.Certificate]:
    """Raises ConfigError."""
    try:
        return certs.from_pem(data)
    except ValueError:
        raise ConfigError(f"{path} holds no certificate in PEM") from None


def check_dates(path: Path, certificate: x509.Certificate, now: datetime) -> None:
    """Raise ConfigError unless it is valid now."""
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= until:
        raise ConfigError(f"{path} expired at {minute(until)}; run `kvferry certs rotate` and copy the new files here")
    if now < since:
        raise ConfigError(f"{path} is valid from {minute(since)} on, and it is {minute(now)} here; set the clock")


def minute(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _copy(role: str) -> str:
    ca, certificate, key = files_of(role)
    return f"copy {ca}, {certificate} and {key} anew from the folder of `kvferry certs init`"


class LiveCredentials:
    """The `Credentials` in a folder as they stand now; `now` is replaced as a whole, never changed. `fault`: why the
    files that lie there cannot be used, if they cannot: then `now` is what they were before."""

    def __init__(self, folder: Path, role: str, clock: Clock | None = None):
        """Raises ConfigError where the files cannot be used."""
        self._folder, self._role, self._clock = folder, role, clock or WallClock()
        self._seen = self._last = self._signature()
        self.fault = ""
        self._warned_at: float | None = None
        self.now = load(folder, role, self._time())

    async def watch(self, changed: Callable[[Credentials], None] = lambda _: None) -> None:
        """Look again and again, until cancelled. `changed` is told of other credentials."""
        while True:
            try:
                if (found := await asyncio.to_thread(self.look)) is not None:
                    self.now = found
                    changed(found)
                self.warn()
            except Exception:
                log.exception("looking at the certificates failed: this is a bug")
            await asyncio.sleep(LOOK_EVERY_S)

    def look(self) -> Credentials | None:
        """Credentials that are others than those last read; None if they are the same, or have changed since the last
        look and may still be written, or cannot be used, which is logged once, and tried again."""
        before, signature = self._last, self._signature()
        self._last = signature
        if signature == self._seen:
            self.fault = ""
        if signature == self._seen or signature != before:
            return None
        try:
            found = load(self._folder, self._role, self._time())
        except ConfigError as error:
            if str(error) != self.fault:
                log.error("%s; the certificate of before stays in use", error)
                self.fault = str(error)
            return None
        self._seen, self.fault = signature, ""
        log.info("the certificate of this %s is another one now, valid until %s", self._role, minute(found.expires))
        if not certs.trusted(certs.from_pem(found.chain), certs.from_pem(self.now.roots)):
            log.warning("its CA is another one, for which that of before does not vouch: who still has the old files "
                        "and this %s refuse each other; copy the new files to every host", self._role)  # fmt: skip
        return found

    def warn(self) -> None:
        """Say in time that the certificate expires, while nobody has seen to it."""
        left, moment = self.now.expires - self._time(), self._clock.now()
        if left > WARN:
            self._warned_at = None
        elif self._warned_at is None or moment - self._warned_at >= WARN_EVERY_S:
            self._warned_at = moment
            log.warning(
                "the certificate of this %s %s at %s; run `kvferry certs rotate` and copy the new files here",
                *(self._role, "expires" if left > timedelta(0) else "expired", minute(self.now.expires)),
            )

    def _time(self) -> datetime:
        return datetime.fromtimestamp(self._clock.now(), UTC)

    def _signature(self) -> list[tuple[int, ...] | None]:
        """Differs when a file has been replaced, written to or made readable. Taken before the files are read, so a
        change in between is seen the next time."""
        return [_signature_of(self._folder / name) for name in files_of(self._role)]


def _signature_of(path: Path) -> tuple[int, ...] | None:
    try:
        told = os.stat(path)
    except OSError:
        return None
    return (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns)
