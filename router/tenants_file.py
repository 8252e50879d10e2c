"""The tenants file: who may ask, by which keys, and how much. It holds all the secrets there are.

TOML, readable by its owner only:

    cluster_secret = "64 hex digits"            # every tenant's keys are derived from it

    [limits]                                    # of every tenant that does not say otherwise; all may be left out
    concurrent_requests = 32                    # under way at once
    requests_per_minute = 600
    tokens_per_minute = 100_000                 # prompts, and what is generated
    prompt_tokens = 8192                        # in one prompt
    kv_blocks = 4096                            # in flight, for prompts and max_tokens
    weight = 1.0                                # share of the workers, among the tenants that want them

    [tenants."acme"]
    tenant_salt = "64 hex digits"               # destroying it erases the tenant

    [tenants."acme".limits]
    requests_per_minute = "unlimited"
    weight = 2.0

    [[keys]]
    id = "3f9a1c2e5b7d"
    tenant = "acme"
    hmac = "64 hex digits"
    created = 2026-01-01T00:00:00Z
    expires = 2027-01-01T00:00:00Z              # left out where it does not expire

A key is `kvf-ID-SECRET`, the secret 32 random bytes in hex, shown once and kept nowhere. The file keeps HMAC-SHA256
with the secret as its key over LP("kvferry/1", "api key", ID, tenant). Nobody can try 2^256 secrets, so neither a slow
hash nor a pepper would add anything; and since id and tenant are under the HMAC, a line edited to name another tenant,
or given another id, belongs to nobody. Limits and `expires` may be edited by hand; `kvferry keys` and `kvferry tenants`
write the file anew, and do not keep comments.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from kvferry.common.errors import ConfigError
from kvferry.common.hashing import KEY_BYTES, TENANT_SALT_BYTES, length_prefixed
from kvferry.common.sampling import WEIGHTS
from kvferry.common.values import nearest_of
from kvferry.router.quota import TenantLimits

TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY_ID = re.compile(r"[0-9a-f]{12}")
KEY = re.compile(rf"kvf-({KEY_ID.pattern})-([0-9a-f]{{64}})")
KEY_LIKE = re.compile(r"kvf-[0-9a-f][0-9a-f-]*|[0-9a-f]{24,}", re.IGNORECASE)  # what may be a key, or a part of one
SURELY_KEY = re.compile(r"kvf-[0-9a-f]{12}(-[0-9a-f]*)?|[0-9a-f]{64}", re.IGNORECASE)
NO_KEY = "0" * 12
LIMITS = tuple(field.name for field in fields(TenantLimits))
UNLIMITED = "unlimited"

LimitsTable = dict[str, int | float | str]


class KeyLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[keys]]` entry. Nothing in it lets anybody in."""

    id: str
    tenant: str
    hmac: str
    created: datetime | None = None
    expires: datetime | None = None


class TenantLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant_salt: str = ""
    limits: LimitsTable = {}

    __repr__ = object.__repr__


class TenantsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file as it stands. Secret."""

    cluster_secret: str
    limits: LimitsTable = {}
    tenants: dict[str, TenantLine] = {}
    keys: tuple[KeyLine, ...] = ()

    __repr__ = object.__repr__

    def limits_of(self, tenant: str) -> TenantLimits:
        told = self.limits | self.tenants[tenant].limits
        return TenantLimits(**{name: None if value == UNLIMITED else value for name, value in told.items()})


def shown_name(name: str) -> str:
    """What somebody gave as a tenant's name, for an error."""
    return "(not repeated: it looks like a key)" if KEY_LIKE.search(name) else repr(name)


def without_keys(text: str) -> str:
    """A sentence for people, with the keys that are in it left out: somebody pasted them where none belongs."""
    return KEY_LIKE.sub(lambda found: "kvf-..." if SURELY_KEY.match(found[0]) else found[0], text)


def key_hmac(secret: bytes, key_id: str, tenant: str) -> str:
    """What the file keeps of a key, in hex."""
    return hmac.new(secret, length_prefixed("kvferry/1", "api key", key_id, tenant), hashlib.sha256).hexdigest()


def read_file(path: Path) -> TenantsFile:
    """The file, checked. Raises ConfigError with what to do; nothing secret is in it."""
    try:
        with open(path, "rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read()
    except FileNotFoundError:
        raise ConfigError(f"there is no tenants file {path}; make one with `kvferry keys create TENANT "
                          f"--tenants-file {path}`") from None  # fmt: skip
    except OSError as error:
        raise ConfigError(f"the tenants file {path} cannot be read: {error.strerror}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"the tenants file {path} holds secrets and others may read it; run `chmod 600 {path}`")
    if not data.endswith(b"\n"):  # half a file can be good TOML, and would revoke the keys of the other half
        raise ConfigError(f"the tenants file {path} is not valid: it was cut off, for it does not end with a newline")
    try:
        file = msgspec.convert(tomllib.loads(data.decode()), TenantsFile)
    except UnicodeDecodeError:
        raise ConfigError(f"the tenants file {path} is not valid: it is not UTF-8") from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"the tenants file {path} is not valid: {error}") from error
    for fault in _faults(file):
        raise ConfigError(f"the tenants file {path} is not valid: {fault}")
    return file


def write_file(path: Path, file: TenantsFile) -> None:
    """Replace the file in one step, where a link leads to it there. It keeps its owner, group and mode, so that who
    reads it still can; a new one has mode 0600. Raises ConfigError."""
    lines = ["# kvferry tenants. Secret: anyone who reads this can read every tenant's cache.",
             "# Limits are set by hand; `kvferry keys` and `kvferry tenants` do not keep comments when they write it.",
             f'cluster_secret = "{file.cluster_secret}"']  # fmt: skip
    lines += _table("limits", file.limits)
    for name, tenant in file.tenants.items():
        lines += ["", f'[tenants."{name}"]', f'tenant_salt = "{tenant.tenant_salt}"']
        lines += _table(f'tenants."{name}".limits', tenant.limits)
    for key in file.keys:
        lines += ["", "[[keys]]", f'id = "{key.id}"', f'tenant = "{key.tenant}"', f'hmac = "{key.hmac}"']
        dates = (("created", key.created), ("expires", key.expires))
        lines += [f"{name} = {when.isoformat(timespec='seconds')}" for name, when in dates if when]
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as opened:
            _own_as(descriptor, path)
            opened.write("\n".join(lines) + "\n")
            opened.flush()
            os.fsync(descriptor)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"the tenants file {path} cannot be written: {error.strerror}") from error


def _own_as(descriptor: int, path: Path) -> None:
    """Give a file the owner, group and mode of the one at `path`, if there is one. Raises OSError."""
    try:
        before = os.stat(path)
    except FileNotFoundError:
        return
    try:
        os.fchown(descriptor, before.st_uid, before.st_gid)
    except PermissionError as error:
        raise PermissionError(error.errno, f"it belongs to user {before.st_uid} and group {before.st_gid}, who would "
                              "lose it; run this as that user or as root") from error  # fmt: skip
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode) & 0o700)


def _table(name: str, limits: LimitsTable) -> list[str]:
    values = [f'{limit} = "{value}"' if isinstance(value, str) else f"{limit} = {value}"
              for limit, value in limits.items()]  # fmt: skip
    return ["", f"[{name}]", *values] if values else []


def new_file() -> TenantsFile:
    return TenantsFile(secrets.token_hex(KEY_BYTES))


def with_key(file: TenantsFile, tenant: str, expires: datetime | None = None) -> tuple[TenantsFile, str]:
    """The file with one more key for a tenant, which is made if it is not there, and the key itself. Raises
    ConfigError for a name that cannot be."""
    if not TENANT_NAME.fullmatch(tenant) or SURELY_KEY.fullmatch(tenant):
        raise ConfigError(f"{shown_name(tenant)} cannot be a tenant's name; use up to 64 letters, digits, dots, dashes "
                          "and underscores, and begin with a letter or digit")  # fmt: skip
    taken = {NO_KEY, *(key.id for key in file.keys)}
    while (key_id := secrets.token_hex(6)) in taken:
        pass
    secret = secrets.token_bytes(32)
    salt = file.tenants.get(tenant) or TenantLine(secrets.token_hex(TENANT_SALT_BYTES))
    line = KeyLine(key_id, tenant, key_hmac(secret, key_id, tenant), datetime.now(UTC).replace(microsecond=0), expires)
    changed = msgspec.structs.replace(file, tenants={**file.tenants, tenant: salt}, keys=(*file.keys, line))
    return changed, f"kvf-{key_id}-{secret.hex()}"


def key_id_of(given: str) -> str:
    """The id in a whole key, or the id itself. Raises ConfigError for what is neither, and does not repeat it: most of
    a key may be in it."""
    if whole := KEY.fullmatch(given):
        return whole[1]
    if not KEY_ID.fullmatch(given):
        raise ConfigError("this is no key's id; give the 12 hex digits in the middle of kvf-ID-SECRET, which "
                          "`kvferry keys list` shows")  # fmt: skip
    return given


def without_key(file: TenantsFile, key_id: str) -> TenantsFile:
    """The file without a key; its tenant stays, with its cached blocks. Raises ConfigError for an unknown id."""
    remaining = tuple(key for key in file.keys if key.id != key_id)
    if len(remaining) == len(file.keys):
        raise ConfigError(f"there is no key {key_id}; `kvferry keys list` shows those there are")
    return msgspec.structs.replace(file, keys=remaining)


def without_tenant(file: TenantsFile, tenant: str) -> TenantsFile:
    """The file without a tenant: its keys, its limits and its salt, without which nobody can find or open its blocks.
    Raises ConfigError for an unknown one."""
    if tenant not in file.tenants:
        raise ConfigError(f"there is no tenant {shown_name(tenant)}; `kvferry tenants list` shows those there are")
    tenants = {name: line for name, line in file.tenants.items() if name != tenant}
    return msgspec.structs.replace(file, tenants=tenants, keys=tuple(key for key in file.keys if key.tenant != tenant))


def _faults(file: TenantsFile) -> Iterator[str]:
    if not _is_hex(file.cluster_secret, KEY_BYTES):
        yield f"cluster_secret must have {2 * KEY_BYTES} hex digits"
    yield from _faults_of_limits("[limits]", file.limits)
    for name, line in file.tenants.items():
        if not TENANT_NAME.fullmatch(name):
            yield f"{shown_name(name)} cannot be a tenant's name"
        if not line.tenant_salt:
            yield f"{name} has no tenant_salt; take it out, run `kvferry keys create {name}`, then set its limits"
        elif not _is_hex(line.tenant_salt, TENANT_SALT_BYTES):
            yield f"tenant_salt of {name} must have {2 * TENANT_SALT_BYTES} hex digits"
        yield from _faults_of_limits(f"the limits of {name}", line.limits)
    seen = {NO_KEY}
    for number, key in enumerate(file.keys, start=1):
        if not KEY_ID.fullmatch(key.id) or key.id in seen:  # a whole key may have been put there: it is not shown
            yield f"the id of key number {number} must have 12 hex digits and occur once"
        if key.tenant not in file.tenants:
            yield f"key {key.id} belongs to {shown_name(key.tenant)}, which is not in [tenants]"
        if not _is_hex(key.hmac, 32):
            yield f"hmac of key {key.id} must have 64 hex digits"
        for name, when in (("created", key.created), ("expires", key.expires)):
            if when is not None and when.tzinfo is None:
                yield f"{name} of key {key.id} has no time zone; write it like 2027-01-31T00:00:00Z"
        seen.add(key.id)


def _faults_of_limits(where: str, limits: LimitsTable) -> Iterator[str]:
    for name, value in limits.items():
        if name not in LIMITS:
            near = nearest_of(name, LIMITS)
            yield f"{where} has {name!r}; " + (f"did you mean {near}?" if near else f"there are {', '.join(LIMITS)}")
        elif name == "weight":
            least, most = WEIGHTS
            if isinstance(value, str) or not least <= value <= most:
                yield f"weight in {where} is {value!r}; it must be a number from {least:g} to {most:g}"
        elif value != UNLIMITED and not (isinstance(value, int) and value >= 1):
            yield f'{name} in {where} is {value!r}; it must be a whole number from 1 on, or "{UNLIMITED}"'


def _is_hex(text: str, size: int) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{{2 * size}}}", text) is not None
