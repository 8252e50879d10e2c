"""Configuration: frozen values, read once, checked when they are made. Nothing else reads the environment.

A wrong value raises `ConfigError` with one sentence that says what would be right.
"""

import os
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from kvferry.common.errors import ConfigError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of `4GiB`, `512MiB`, `1.5G` or `4096`."""
    if not (found := SIZE.fullmatch(text.strip())):
        raise ConfigError(f"{text!r} is not a size; write it like 4GiB, 512MiB or 4096")
    return int(float(found[1]) * UNITS[(found[2] or "").lower()])


def cache_dir() -> Path:
    """The user's cache folder for kvferry (XDG_CACHE_HOME, else ~/.cache), made if need be."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "kvferry"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_loopback(host: str) -> bool:
    """Whether a listener on `host` can only be reached from this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_worker_address(address: str) -> str:
    """A worker's gRPC address: `unix:/path` or a loopback `host:port`. The tenant's keys travel to it, so a plain
    address that other hosts could reach is refused."""
    if address.startswith("unix:"):
        return address
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise ConfigError(f"{address!r} is not a worker address; write unix:/path or 127.0.0.1:PORT")
    if not is_loopback(host.strip("[]")):
        raise ConfigError(f"{address} can be reached from other hosts, and tenant keys would cross the network in the "
                          "clear; use unix:/path or a loopback address")  # fmt: skip
    return address


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """One store node. `lease_s`: how long a silent connection keeps its leases."""

    socket: Path
    size_bytes: int = 2**30
    lease_s: float = 10.0
    writing_per_connection: int = 1024

    def __post_init__(self) -> None:
        _require(self.size_bytes >= 2**20, f"a store of {self.size_bytes} bytes is too small; give at least 1MiB")
        _require(self.lease_s >= 0.2, f"leases of {self.lease_s} s are too short; give at least 0.2")
        _require(len(str(self.socket)) < 100, f"the socket path {self.socket} is too long; a unix path has 107 bytes")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What one engine may use. `kv_cache_bytes` is the page pool; `num_blocks`, if set, says it in blocks instead."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int = 256
    kv_cache_bytes: int = 2**30
    num_blocks: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_waiting"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_model_len", "num_blocks", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")
        _require(self.dtype in ("auto", "float32", "bfloat16", "float16"),
                 f"dtype {self.dtype!r} is not known; use auto, float32, bfloat16 or float16")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """A prefill or decode process. `single_flight_wait_s` bounds one wait for somebody else's fill."""

    role: str
    engine: EngineConfig
    listen: str
    store: Path
    single_flight_wait_s: float = 20.0
    drain_s: float = 30.0
    failpoints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_worker_address(self.listen)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The HTTP front. `max_local_prefill`: up to so many uncached prompt tokens are computed by decode itself."""

    model: str
    served_model_name: str
    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    store: Path
    revision: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    admin_host: str = "127.0.0.1"
    admin_port: int = 8001
    tenants_file: Path | None = None
    max_local_prefill: int = 64
    admission_s: float = 60.0
    node_wait_s: float = 20.0
    request_s: float = 600.0
    max_body_bytes: int = 16 * 2**20
    max_concurrent: int = 512
    drain_s: float = 4.0

    def __post_init__(self) -> None:
        for address in (*self.prefill, *self.decode):
            check_worker_address(address)
        _require(bool(self.decode), "a router needs at least one decode address")
        if self.tenants_file is None and not is_loopback(self.host):
            raise ConfigError(
                f"without a tenants file everyone who reaches {self.host} would share one tenant; give --tenants-file "
                "(make one with `kvferry keys create TENANT --tenants-file FILE`) or listen on 127.0.0.1"
            )
