"""The folder that `kvferry certs` keeps: a CA with its key, a certificate and key for each role, the stores' secret.

    ca.pem              whom everybody trusts: this CA, and after `rotate --ca` the one before it, for a while
    ca.key              who has it can be anybody: it stays here
    ca.bridge.pem       only while there are two: what the old CA says of the new one, which certificates bring along
    ROLE.pem ROLE.key
    store.secret

Files are replaced one by one, each in one step. Their order is such that what there is at any moment fits together, so
that to break off and start again does no harm.
"""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from kvferry.common import certs
from kvferry.common.certs import Authority
from kvferry.common.credentials import CA_FILE, certificate_file, certificates_in, key_file, minute, read
from kvferry.common.errors import ConfigError

CA_KEY = "ca.key"
BRIDGE = "ca.bridge.pem"
STORE_SECRET = "store.secret"
SECRET_MODE, PUBLIC_MODE = 0o600, 0o644


@dataclass(frozen=True)
class Trust:
    """The CA that issues now, those before it that are still trusted, and what one of them says of it."""

    authority: Authority
    older: Sequence[x509.Certificate] = ()
    bridge: Sequence[x509.Certificate] = ()

    @property
    def issuing(self) -> x509.Certificate:
        return self.authority.certificate

    @property
    def roots(self) -> list[x509.Certificate]:
        return [self.issuing, *self.older]

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Trust in a CA comes before its key, for that says which CA issues."""
        yield CA_FILE, certs.to_pem(self.roots)
        if self.bridge:
            yield BRIDGE, certs.to_pem(self.bridge)
        yield CA_KEY, certs.key_to_pem(self.authority.key)

    def leaves(self, now: datetime, lifetime: timedelta) -> Iterator[tuple[str, bytes]]:
        for role in certs.ROLES:
            leaf = certs.issue(self.authority, role, now, lifetime)
            yield key_file(role), certs.key_to_pem(leaf.key)
            yield certificate_file(role), certs.to_pem([leaf.certificate, *self.bridge])


def read_trust(folder: Path, now: datetime) -> Trust:
    """The trust of a folder; a CA that has expired is none of the older ones. Raises ConfigError."""
    if not os.path.exists(folder / CA_KEY):
        raise ConfigError(f"there is no {folder / CA_KEY}; rotate in the folder that `kvferry certs init` made")
    roots = certificates_in(folder / CA_FILE, read(folder / CA_FILE))
    try:
        key = certs.key_from_pem(read(folder / CA_KEY))
    except ValueError:
        raise ConfigError(f"{folder / CA_KEY} is not a key in PEM") from None
    issuing = next((one for one in roots if certs.fits(key, one)), None)
    if issuing is None:
        raise ConfigError(f"{folder / CA_KEY} is not the key of a CA of {folder / CA_FILE}")
    older = [one for one in roots if one != issuing and one.not_valid_after_utc > now]
    bridge = []
    if os.path.exists(folder / BRIDGE):
        said = certificates_in(folder / BRIDGE, read(folder / BRIDGE))
        bridge = [one for one in said if certs.fits(key, one) and any(certs.issued(old, one) for old in older)]
    return Trust(Authority(issuing, key), older, bridge)


def next_trust(
    folder: Path, trust: Trust, now: datetime, ca_lifetime: timedelta, new_ca: bool, drop_old_ca: bool
) -> Trust:
    """Whom to trust from now on. Raises ConfigError."""
    authority, until = trust.authority, trust.issuing.not_valid_after_utc
    if not new_ca:
        if until <= now:
            raise ConfigError(f"the CA of {folder} expired at {minute(until)}; begin another one with --ca")
        return Trust(authority) if drop_old_ca else trust
    if trust.older and not drop_old_ca:
        raise ConfigError(f"{folder / CA_FILE} still trusts the CA before this one; when every host has its files, run "
                          f"`kvferry certs rotate {folder} --drop-old-ca`, and begin a new one after that")  # fmt: skip
    new = certs.new_authority(now, ca_lifetime)
    if drop_old_ca or until <= now:
        return Trust(new)
    return Trust(new, [trust.issuing], [certs.vouch(authority, new, now)])


def make(folder: Path, now: datetime, lifetime: timedelta, ca_lifetime: timedelta) -> Trust:
    """Fill a folder, which is made if need be. Raises ConfigError, and leaves nothing behind then."""
    new = not folder.exists()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there, mode = sorted(os.listdir(folder)), folder.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}") from error
    if there:
        raise ConfigError(f"{folder} is not empty, there is {there[0]}; give a folder that is not there yet, or renew "
                          f"certificates with `kvferry certs rotate {folder}`")  # fmt: skip
    if mode & 0o077:
        raise ConfigError(f"others may look into {folder}, where secrets are to be; run `chmod 700 {folder}`")
    trust = Trust(certs.new_authority(now, ca_lifetime))
    secret = secrets.token_hex(32).encode() + b"\n"
    files = dict([*trust.files(), *trust.leaves(now, lifetime), (STORE_SECRET, secret)])
    try:
        for name, data in files.items():
            write(folder / name, data)
    except ConfigError:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        if new:
            with suppress(OSError):  # what is told is why it could not be filled
                folder.rmdir()
        raise
    return trust


def renew(folder: Path, trust: Trust, now: datetime, lifetime: timedelta) -> None:
    """Write certificates of this trust, for every role. Raises ConfigError."""
    for name, data in [*trust.files(), *trust.leaves(now, lifetime)]:
        write(folder / name, data)
    if not trust.bridge:
        (folder / BRIDGE).unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step. It keeps its owner and group; what is not a certificate is its owner's alone. Raises
    ConfigError."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, SECRET_MODE)
        with open(descriptor, "wb") as opened:
            if path.exists():
                before = path.stat()
                os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, PUBLIC_MODE if path.suffix == ".pem" else SECRET_MODE)
            opened.write(data)
            opened.flush()
            os.fsync(descriptor)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
