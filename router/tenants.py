"""Who may ask: the tenants file, API keys and what a key stands for.

The file is TOML, readable by its owner only, and holds all the secrets there are:

    cluster_secret = "64 hex digits"            # every tenant's keys are derived from it

    [tenants."acme"]
    tenant_salt = "64 hex digits"               # destroying it erases the tenant

    [[keys]]
    id = "3f9a1c2e5b7d"
    tenant = "acme"
    hmac = "64 hex digits"

A key is `kvf-ID-SECRET`, the secret 32 random bytes in hex, shown once and kept nowhere. The file keeps HMAC-SHA256
with the secret as its key over LP("kvferry/1", "api key", ID, tenant). Nobody can try 2^256 secrets, so neither a slow
hash nor a pepper would add anything; and since id and tenant are under the HMAC, a line edited to name another tenant,
or given another id, belongs to nobody.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
import tomllib
from pathlib import Path

import msgspec

from kvferry.common.errors import ConfigError, Unauthenticated
from kvferry.common.hashing import KEY_BYTES, TENANT_SALT_BYTES, TenantId, TenantKeys, length_prefixed

TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY = re.compile(r"kvf-([0-9a-f]{12})-([0-9a-f]{64})")
DEFAULT_TENANT = TenantId("default")
NO_KEY = "0" * 12


class KeyLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[keys]]` entry. Nothing in it lets anybody in."""

    id: str
    tenant: str
    hmac: str


class TenantLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant_salt: str


class TenantsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file as it stands. Secret."""

    cluster_secret: str
    tenants: dict[str, TenantLine] = {}
    keys: tuple[KeyLine, ...] = ()

    __repr__ = object.__repr__


class Tenants:
    """Keys to tenants, tenants to the keys of their block names. Read once; immutable."""

    def __init__(
        self, cluster_secret: bytes, salts: dict[TenantId, bytes], keys: dict[str, KeyLine], open_to_all: bool
    ):
        self._keys = keys
        self._tenant_keys = {name: TenantKeys.derive(cluster_secret, name, salt) for name, salt in salts.items()}
        self._open_to_all = open_to_all
        self._nobody = KeyLine(NO_KEY, "nobody", secrets.token_hex(32))

    @classmethod
    def load(cls, path: Path) -> "Tenants":
        """Raises ConfigError."""
        file = read_file(path)
        salts = {TenantId(name): bytes.fromhex(line.tenant_salt) for name, line in file.tenants.items()}
        return cls(bytes.fromhex(file.cluster_secret), salts, {key.id: key for key in file.keys}, open_to_all=False)

    @classmethod
    def single(cls) -> "Tenants":
        """One tenant for everybody, with a secret that lasts as long as this process: for loopback only."""
        salts = {DEFAULT_TENANT: secrets.token_bytes(TENANT_SALT_BYTES)}
        return cls(secrets.token_bytes(KEY_BYTES), salts, {}, open_to_all=True)

    def authenticate(self, authorization: str | None) -> TenantId:
        """The tenant of an `Authorization` header. Raises Unauthenticated, after the same work for a key id that does
        not exist as for a wrong secret."""
        if self._open_to_all:
            return DEFAULT_TENANT
        scheme, _, credential = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not credential.strip():
            raise Unauthenticated("no API key; send it as `Authorization: Bearer kvf-...`")
        if not (parsed := KEY.fullmatch(credential.strip())):
            raise Unauthenticated("the API key is not valid")
        known = self._keys.get(parsed[1], self._nobody)
        right = hmac.compare_digest(key_hmac(bytes.fromhex(parsed[2]), parsed[1], known.tenant), known.hmac)
        if not right or known is self._nobody:
            raise Unauthenticated("the API key is not valid")
        return TenantId(known.tenant)

    def keys_of(self, tenant: TenantId) -> TenantKeys:
        """What workers need of a tenant that `authenticate` gave."""
        return self._tenant_keys[tenant]


def key_hmac(secret: bytes, key_id: str, tenant: str) -> str:
    """What the file keeps of a key, in hex."""
    return hmac.new(secret, length_prefixed("kvferry/1", "api key", key_id, tenant), hashlib.sha256).hexdigest()


def read_file(path: Path) -> TenantsFile:
    """The file, checked. Raises ConfigError with what to do."""
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
    try:
        file = msgspec.convert(tomllib.loads(data.decode()), TenantsFile)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"the tenants file {path} is not valid: {error}") from error
    for fault in _faults(file):
        raise ConfigError(f"the tenants file {path} is not valid: {fault}")
    return file


def write_file(path: Path, file: TenantsFile) -> None:
    """Replace the file in one step; mode 0600. Raises ConfigError."""
    lines = ["# kvferry tenants. Secret: anyone who reads this can read every tenant's cache.",
             f'cluster_secret = "{file.cluster_secret}"']  # fmt: skip
    for name, tenant in file.tenants.items():
        lines += ["", f'[tenants."{name}"]', f'tenant_salt = "{tenant.tenant_salt}"']
    for key in file.keys:
        lines += ["", "[[keys]]", f'id = "{key.id}"', f'tenant = "{key.tenant}"', f'hmac = "{key.hmac}"']
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as opened:
            opened.write("\n".join(lines) + "\n")
            opened.flush()
            os.fsync(descriptor)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"the tenants file {path} cannot be written: {error.strerror}") from error


def new_file() -> TenantsFile:
    return TenantsFile(secrets.token_hex(KEY_BYTES))


def with_key(file: TenantsFile, tenant: str) -> tuple[TenantsFile, str]:
    """The file with one more key for a tenant, which is made if it is not there, and the key itself."""
    if not TENANT_NAME.fullmatch(tenant):
        raise ConfigError(f"{tenant!r} cannot be a tenant's name; use up to 64 letters, digits, dots, dashes and "
                          "underscores, and begin with a letter or digit")  # fmt: skip
    taken = {NO_KEY, *(key.id for key in file.keys)}
    while (key_id := secrets.token_hex(6)) in taken:
        pass
    secret = secrets.token_bytes(32)
    salt = file.tenants.get(tenant) or TenantLine(secrets.token_hex(TENANT_SALT_BYTES))
    line = KeyLine(key_id, tenant, key_hmac(secret, key_id, tenant))
    changed = TenantsFile(file.cluster_secret, {**file.tenants, tenant: salt}, (*file.keys, line))
    return changed, f"kvf-{key_id}-{secret.hex()}"


def without_key(file: TenantsFile, key_id: str) -> TenantsFile:
    """The file without a key; its tenant stays, with its cached blocks. Raises ConfigError for an unknown id."""
    remaining = tuple(key for key in file.keys if key.id != key_id)
    if len(remaining) == len(file.keys):
        raise ConfigError(f"there is no key {key_id}; `kvferry keys list` shows those there are")
    return TenantsFile(file.cluster_secret, file.tenants, remaining)


def _faults(file: TenantsFile):
    if not _is_hex(file.cluster_secret, KEY_BYTES):
        yield f"cluster_secret must have {2 * KEY_BYTES} hex digits"
    for name, line in file.tenants.items():
        if not TENANT_NAME.fullmatch(name):
            yield f"{name!r} cannot be a tenant's name"
        if not _is_hex(line.tenant_salt, TENANT_SALT_BYTES):
            yield f"tenant_salt of {name} must have {2 * TENANT_SALT_BYTES} hex digits"
    seen = {NO_KEY}
    for key in file.keys:
        if not re.fullmatch(r"[0-9a-f]{12}", key.id) or key.id in seen:
            yield f"key id {key.id!r} must have 12 hex digits and occur once"
        if key.tenant not in file.tenants:
            yield f"key {key.id} belongs to {key.tenant!r}, which is not in [tenants]"
        if not _is_hex(key.hmac, 32):
            yield f"hmac of key {key.id} must have 64 hex digits"
        seen.add(key.id)


def _is_hex(text: str, size: int) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{{2 * size}}}", text) is not None
