"""Who may ask: what an API key stands for, as the tenants file has it now.

A running router looks at its file twice a second and takes a changed one whole, once it has stood still between two
looks; one that is damaged or gone changes nothing. From then on a key that was revoked, or has expired, is refused:
what it has asked before is answered to its end. A tenant that was erased is gone at once, and so is what it has under
way.
"""

import asyncio
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path

from kvferry.common.clock import Clock, WallClock
from kvferry.common.errors import ConfigError, Unauthenticated
from kvferry.common.hashing import KEY_BYTES, TENANT_SALT_BYTES, TenantId, TenantKeys
from kvferry.common.values import counted
from kvferry.router.quota import UNLIMITED, TenantLimits
from kvferry.router.tenants_file import KEY, NO_KEY, KeyLine, TenantsFile, key_hmac, read_file

DEFAULT_TENANT = TenantId("default")
LOOK_EVERY_S = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks: what workers need of it, and what it may use."""

    name: TenantId
    keys: TenantKeys = field(repr=False)
    limits: TenantLimits = UNLIMITED


class Tenants:
    """Keys to tenants. Immutable."""

    def __init__(
        self,
        tenants: Mapping[TenantId, Tenant],
        keys: Mapping[str, KeyLine],
        clock: Clock,
        everybody: Tenant | None = None,
    ):
        """`clock` has the seconds since 1970. `everybody`: who asks where no key is needed."""
        self._tenants, self._keys, self._clock, self._everybody = tenants, keys, clock, everybody
        self._nobody = KeyLine(NO_KEY, "nobody", secrets.token_hex(32))

    @classmethod
    def of(cls, file: TenantsFile, clock: Clock) -> "Tenants":
        secret = bytes.fromhex(file.cluster_secret)
        tenants = {}
        for name, line in file.tenants.items():
            keys = TenantKeys.derive(secret, TenantId(name), bytes.fromhex(line.tenant_salt))
            tenants[TenantId(name)] = Tenant(TenantId(name), keys, file.limits_of(name))
        return cls(tenants, {key.id: key for key in file.keys}, clock)

    @classmethod
    def load(cls, path: Path) -> "Tenants":
        """Raises ConfigError."""
        return cls.of(read_file(path), WallClock())

    @classmethod
    def single(cls) -> "Tenants":
        """One tenant for everybody, with a secret that lasts as long as this process: for loopback only."""
        secret, salt = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(TENANT_SALT_BYTES)
        everybody = Tenant(DEFAULT_TENANT, TenantKeys.derive(secret, DEFAULT_TENANT, salt))
        return cls({DEFAULT_TENANT: everybody}, {}, WallClock(), everybody)

    def __getitem__(self, name: TenantId) -> Tenant:
        return self._tenants[name]

    @property
    def limits(self) -> dict[TenantId, TenantLimits]:
        return {name: tenant.limits for name, tenant in self._tenants.items()}

    @property
    def pseudonyms(self) -> frozenset[str]:
        return frozenset(tenant.keys.pseudonym for tenant in self._tenants.values())

    def authenticate(self, authorization: str | None) -> Tenant:
        """Whose an `Authorization` header is. Raises Unauthenticated, after the same work for a key id that does not
        exist as for a wrong secret; only who has the secret is told that the key has expired."""
        if self._everybody is not None:
            return self._everybody
        scheme, _, credential = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not credential.strip():
            raise Unauthenticated("no API key; send it as `Authorization: Bearer kvf-...`")
        if not (parsed := KEY.fullmatch(credential.strip())):
            raise Unauthenticated("the API key is not valid")
        known = self._keys.get(parsed[1], self._nobody)
        right = hmac.compare_digest(key_hmac(bytes.fromhex(parsed[2]), parsed[1], known.tenant), known.hmac)
        if not right or known is self._nobody:
            raise Unauthenticated("the API key is not valid")
        if known.expires is not None and self._clock.now() >= known.expires.timestamp():
            when = known.expires.astimezone(UTC)
            raise Unauthenticated(f"the API key expired at {when:%Y-%m-%d %H:%M} UTC; ask for another one")
        return self._tenants[TenantId(known.tenant)]


class LiveTenants:
    """The `Tenants` of a file as it stands now; `now` is replaced as a whole, never changed."""

    def __init__(self, path: Path | None, clock: Clock | None = None):
        """Without a path, one tenant for everybody. Raises ConfigError where the file cannot be used."""
        self._path, self._clock = path, clock or WallClock()
        self._seen = self._last = self._signature()
        self._fault = ""
        self.now = Tenants.single() if path is None else Tenants.of(read_file(path), self._clock)

    def authenticate(self, authorization: str | None) -> Tenant:
        """As `Tenants.authenticate`."""
        return self.now.authenticate(authorization)

    async def watch(self, changed: Callable[[Tenants], None]) -> None:
        """Look again and again, until cancelled. `changed` is told of other tenants, at once. The thread that looks
        does nothing else: however many large requests wait for theirs, a revoked key is refused in time."""
        with ThreadPoolExecutor(1, "tenants") as thread:
            while self._path is not None:
                await asyncio.sleep(LOOK_EVERY_S)
                try:
                    if (found := await asyncio.get_running_loop().run_in_executor(thread, self.look)) is not None:
                        self.now = found
                        changed(found)
                except Exception:
                    log.exception("looking at the tenants file failed: this is a bug")

    def look(self) -> Tenants | None:
        """The tenants of a file that is another than the one last read; None if it is the same, or has changed since
        the last look and may still be written, or cannot be used, which is logged once, and tried again."""
        before, signature = self._last, self._signature()
        self._last = signature
        if self._path is None or signature == self._seen or signature != before:
            return None
        try:
            file = read_file(self._path)
        except ConfigError as error:
            if str(error) != self._fault:
                log.error("%s; the tenants and keys of before stay as they are", error)
                self._fault = str(error)
            return None
        self._seen, self._fault = signature, ""
        there = (counted(len(file.tenants), "tenant"), counted(len(file.keys), "key"))
        log.info("the tenants file has changed: %s, %s", *there)
        return Tenants.of(file, self._clock)

    def _signature(self) -> tuple[int, ...] | None:
        """Differs when the file has been replaced, written to or made readable. Taken before the file is read, so a
        change in between is seen the next time."""
        if self._path is None:
            return None
        try:
            told = os.stat(self._path)
        except OSError:
            return None
        return (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns)
