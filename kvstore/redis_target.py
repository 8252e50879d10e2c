"""Where the directory's Redis is: its URL, the files with its password and certificates, and what its user may do."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvferry.common.errors import ConfigError

EXAMPLES = (
    "redis://host:6379/0, rediss://host:6379/0, unix:///path, "
    "redis+sentinel://host:26379,host:26379/master/0 or redis+cluster://host:6379,host:6379"
)
KINDS = {"redis": 6379, "redis+cluster": 6379, "redis+sentinel": 26379, "unix": 0}  # by scheme, with the default port
TLS = {"rediss": "redis", "rediss+cluster": "redis+cluster", "rediss+sentinel": "redis+sentinel"}
# `select` is for a database other than 0, `command` and `cluster|slots` are for a cluster.
COMMANDS = "+mget +get +set +pexpire +select +command +cluster|slots"
KEY_PREFIX = "kvf:"


@dataclass(frozen=True, kw_only=True)
class RedisTarget:
    """A Redis, or several. Made by `parse_redis_url`. Nothing in it is secret; the files are read at each connect.

    `kind`: redis, redis+cluster, redis+sentinel or unix. `hosts`: of a sentinel or cluster those to ask first.
    `path`: the unix socket. `master`: what Sentinel calls the Redis.
    """

    kind: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    master: str = ""
    db: int = 0
    tls: bool = False
    user: str | None = None
    password_file: Path | None = None
    sentinel_password_file: Path | None = None
    ca_file: Path | None = None

    def __str__(self) -> str:
        """For people: its URL."""
        if self.path:
            return f"unix://{self.path}"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        rest = "/".join(part for part in (self.master, str(self.db or "")) if part)
        return f"{self.kind.replace('redis', 'rediss') if self.tls else self.kind}://{hosts}" + (rest and f"/{rest}")

    def login(self) -> dict[str, str]:
        """redis-py's arguments. Raises ConfigError."""
        if self.password_file is None:
            return {}
        return {"password": read_password(self.password_file)} | ({"username": self.user} if self.user else {})

    def sentinel_login(self) -> dict[str, str]:
        """The same for the sentinels, who have users of their own. Raises ConfigError."""
        return {"password": read_password(self.sentinel_password_file)} if self.sentinel_password_file else {}

    def encryption(self) -> dict[str, Any]:
        """redis-py's arguments. Certificates are checked, against `ca_file` or the system's authorities."""
        checked = {"ssl_cert_reqs": "required", "ssl_check_hostname": True, "ssl_min_version": ssl.TLSVersion.TLSv1_2}
        return checked | ({"ssl_ca_certs": str(self.ca_file)} if self.ca_file else {}) if self.tls else {}


def parse_redis_url(
    url: str,
    *,
    user: str | None = None,
    password_file: Path | None = None,
    sentinel_password_file: Path | None = None,
    ca_file: Path | None = None,
) -> RedisTarget:
    """Raises ConfigError for a wrong URL or file. What may hold a password is never repeated."""
    if "@" in url:
        raise ConfigError("a Redis URL has no user or password in it; give the user and a password file beside it")
    if "?" in url or "#" in url:
        raise ConfigError(f"a Redis URL has no options in it; write it like {EXAMPLES}")
    scheme, _, rest = url.partition("://")
    kind = TLS.get(scheme, scheme)
    if kind not in KINDS or not rest:
        raise ConfigError(f"{url!r} is not a Redis URL; write it like {EXAMPLES}")
    if user and password_file is None:
        raise ConfigError(f"the Redis user {user} needs a password file")
    if ca_file is not None and scheme not in TLS:
        raise ConfigError(f"{url} is not encrypted, so a CA file is of no use; write rediss: for redis:")
    if sentinel_password_file is not None and kind != "redis+sentinel":
        raise ConfigError(f"{url} has no sentinels, so a password of theirs is of no use")
    target = RedisTarget(
        **_parts(kind, url, rest),
        kind=kind,
        tls=scheme in TLS,
        user=user or None,
        password_file=password_file,
        sentinel_password_file=sentinel_password_file,
        ca_file=ca_file,
    )
    target.login()
    target.sentinel_login()
    if ca_file is not None:
        _check_authorities(ca_file)
    return target


def read_password(path: Path) -> str:
    """The first line of a file. Raises ConfigError."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"the Redis password file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"the Redis password file {path} is not text") from None
    if not (password := text.split("\n", 1)[0].strip()):
        raise ConfigError(f"the Redis password file {path} has no password in its first line")
    return password


def redis_acl(user: str, password: str = "") -> str:
    """The line that gives a Redis user what the directory needs, and nothing else: the same for one server, for each
    that Sentinel watches, and for each of a cluster. Of the password it has the hash; without one a place for it.

    Raises ConfigError.
    """
    if not user or any(letter.isspace() or letter == "\0" for letter in user):
        raise ConfigError("a Redis user's name is not empty and has no spaces")
    proof = f"#{sha256(password.encode()).hexdigest()}" if password else ">PASSWORD"
    return f"ACL SETUSER {user} reset on {proof} ~{KEY_PREFIX}* {COMMANDS}"


def _parts(kind: str, url: str, rest: str) -> Mapping[str, Any]:
    """Where it is, of what stands behind `://`."""
    if kind == "unix":
        if not rest.startswith("/"):
            raise ConfigError(f"{url} has no absolute path; write it like unix:///run/redis.sock")
        return {"path": rest}
    places, *words = rest.rstrip("/").split("/")
    found: dict[str, Any] = {"hosts": tuple(_host(place, url, KINDS[kind]) for place in places.split(","))}
    if kind == "redis" and len(found["hosts"]) > 1:
        raise ConfigError(f"{url} names several hosts; write redis+cluster: or redis+sentinel: for redis:")
    if kind == "redis+sentinel":
        if not words or not words[0]:
            raise ConfigError(f"{url} does not say which master; write it like redis+sentinel://host:26379/master")
        found["master"] = words.pop(0)
    if words:
        if kind == "redis+cluster" or len(words) > 1 or not words[0].isdecimal():
            raise ConfigError(f"{url} has {'/'.join(words)!r} at its end, which is no database; "
                              f"write it like {EXAMPLES}")  # fmt: skip
        found["db"] = int(words[0])
    return found


def _host(place: str, url: str, default: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port == 0 or any(letter.isspace() for letter in place):
        raise ConfigError(f"{url!r} has {place!r} where a host and port should be; write it like {EXAMPLES}")
    return host, port or default


def _check_authorities(path: Path) -> None:
    try:
        ssl.create_default_context(cafile=str(path))
    except OSError as error:  # an SSLError is one
        raise ConfigError(f"the CA file {path} cannot be used: {error.strerror or error}") from error
