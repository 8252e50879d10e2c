"""Configuration: frozen values, read once, checked when they are made. Nothing else reads the environment.

Each value is declared once, here or where its dataclass is: its name, type and default, and in the field's metadata
what `setting` takes. Flags, environment names, keys of the TOML file and `kvferry check-config` follow from that (see
cli/settings.py). A wrong value raises `ConfigError` with one sentence that says what would be right.
"""

import os
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from kvferry.common.errors import ConfigError
from kvferry.common.values import WrongValue, require_least, require_word, setting, size_text

ENVIRONMENT_PREFIX = "KVFERRY_"
HOST_PORT = re.compile(r"(?P<host>[\w.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
LOG_FORMATS = ("auto", "text", "json")
MAX_SOCKET_PATH = 107  # bytes: sun_path of unix(7), less the zero at its end


def environment() -> dict[str, str]:
    """The variables that are kvferry's own."""
    return {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT_PREFIX)}


def foreign_environment() -> dict[str, str]:
    """All the others: what a child process gets that is told everything by flags. gRPC's own log is no JSON; its errors
    come to us as exceptions."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    return {"GRPC_VERBOSITY": "ERROR", **others}


def silence_grpc() -> None:
    """Leave gRPC's own log out, of this process. Before gRPC is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


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


def is_unspecified(host: str) -> bool:
    """Whether it stands for all of a machine's addresses."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def is_local(address: str) -> bool:
    """Whether a worker's address can only be reached from this machine."""
    return address.startswith("unix:") or is_loopback(address.rpartition(":")[0].strip("[]"))


def split_address(address: str, what: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 address stands in brackets. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (":" in bare and bare == host) or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise ConfigError(f"{what} {address!r} is not HOST:PORT, such as 10.0.0.1:7700")
    return bare, int(port)


def check_worker_address(address: str, certs: Path | None) -> str:
    """A worker's gRPC address: `unix:/path` or `host:port`. Tenants' keys travel to it, so without certificates it is
    one that no other host can reach."""
    if address.startswith("unix:"):
        check_socket_path(address.removeprefix("unix:"), "a worker's socket path")
        return address
    if not (found := HOST_PORT.fullmatch(address)):
        raise ConfigError(f"{address!r} is not a worker address; write unix:/path or 127.0.0.1:PORT")
    if certs is None and not is_loopback(found["host"].strip("[]")):
        raise ConfigError(f"{address} can be reached from other hosts, and tenant keys would cross the network in the "
                          "clear; give --certs DIR, which `kvferry certs init DIR` makes, or use unix:/path or a "
                          "loopback address")  # fmt: skip
    return address


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def check_socket_path(path: Path | str, what: str) -> None:
    _require(
        (length := len(os.fsencode(path))) <= MAX_SOCKET_PATH,
        f"{what}, {path}, is too long: it has {length} bytes, and a unix socket's has {MAX_SOCKET_PATH} at most",
    )


def check_port(config: "RouterConfig", field: str) -> None:
    if not 0 <= (port := getattr(config, field)) <= 65535:
        raise WrongValue(config, field, f"is {port}; a port is a number from 0 (any that is free) to 65535")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How every process logs, on stderr."""

    log_level: str = setting("DEBUG, INFO, WARNING or ERROR.", "INFO")
    log_format: str = setting("text, json, or auto: text on a terminal, JSON lines otherwise.", "auto")

    def __post_init__(self) -> None:
        levels = ("DEBUG", "INFO", "WARNING", "ERROR")
        if self.log_level.upper() not in levels:
            raise WrongValue(self, "log_level", f"is {self.log_level!r}; use {', '.join(levels[:-1])} or {levels[-1]}")
        require_word(self, "log_format", *LOG_FORMATS)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What `kvferry serve` starts, beside what its parts are told."""

    prefill: int = setting("Prefill workers.", 1)
    decode: int = setting("Decode workers.", 1)
    store_arg: tuple[str, ...] = setting("One more argument for the store; may be repeated.", ())
    prefill_arg: tuple[str, ...] = setting("One more argument for prefill workers.", ())
    decode_arg: tuple[str, ...] = setting("One more argument for decode workers.", ())
    router_arg: tuple[str, ...] = setting("One more argument for the router.", ())

    def __post_init__(self) -> None:
        require_least(self, 0, "prefill")
        require_least(self, 1, "decode")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """One store node. `lease_s`: how long a silent connection keeps its leases."""

    socket: Path = setting("Unix socket to answer at.", example="/run/kvferry/store")
    size_bytes: int = setting("Memory for blocks, taken whole at the start.", 2**30, name="size")
    lease_s: float = setting("How long a silent connection keeps its leases.", 10.0)
    writing_per_connection: int = setting("Blocks that one worker may be writing at a time.", 1024)
    listen: str | None = setting(
        "HOST:PORT at which stores of other hosts fetch blocks.", None, metavar="ADDRESS", unset="this host alone"
    )
    advertise: str | None = setting(
        "HOST:PORT by which other stores reach it.", None, metavar="ADDRESS", unset="what it listens on"
    )
    redis: str | None = setting(
        "Redis that tells who has which block: redis://HOST:PORT, redis+sentinel://... or redis+cluster://...", None,
        metavar="URL", unset="none: blocks are only fetched from where they were just computed",
    )  # fmt: skip
    redis_user: str | None = setting("Its user.", None, unset="the default one")
    redis_password_file: Path | None = setting("File with the password for Redis.", None, secret=True, unset="none")
    redis_ca_file: Path | None = setting("Certificates that rediss:// trusts.", None, unset="the system's")
    peer_secret_file: Path | None = setting(
        "File with the secret by which the stores of a cluster know one another.", None, secret=True, unset="none"
    )
    cluster: str = setting("What the stores that belong together call themselves.", "kvferry")
    connections: int = setting("Connections by which one fetch may use each other store, 1 to 4.", 2)

    @property
    def address(self) -> str:
        """By which other stores reach this one; empty if they cannot."""
        return self.advertise or self.listen or ""

    @property
    def only_sealed(self) -> bool:
        """Whether plain blocks could leave the host."""
        return self.listen is not None and not is_loopback(split_address(self.listen, "--listen")[0])

    def __post_init__(self) -> None:
        if self.listen is not None:
            host, _ = split_address(self.listen, "--listen")
            _require(self.advertise is not None or not is_unspecified(host),
                     f"--listen {self.listen} is on all interfaces; give --advertise HOST:PORT as well")  # fmt: skip
            _require(self.peer_secret_file is not None,
                     "--listen needs --peer-secret-file, so that only this cluster's stores are served; "
                     "`kvferry certs init DIR` makes one")  # fmt: skip
        if self.advertise is not None:
            _require(self.listen is not None, "--advertise says how others reach a store that has no --listen")
            split_address(self.advertise, "--advertise")
        _require(self.redis is None or self.listen is not None,
                 "--redis tells other hosts what this store has, so it needs --listen too")  # fmt: skip
        if not 1 <= self.connections <= 4:
            raise WrongValue(self, "connections", f"is {self.connections}; it must be 1 to 4")
        _require(0 < len(self.cluster) <= 64, "a cluster's name has 1 to 64 characters")
        if self.size_bytes < 2**20:
            raise WrongValue(self, "size_bytes", f"is {size_text(self.size_bytes)}; it must be at least 1MiB")
        require_least(self, 0.2, "lease_s")
        require_least(self, 1, "writing_per_connection")
        check_socket_path(self.socket, "the store's socket path")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What one engine may use. `kv_cache_bytes` is the page pool; `num_blocks`, if set, says it in blocks instead."""

    model: str = setting("`demo`, a Hugging Face id or a local folder.", example="demo")
    revision: str | None = setting("Branch, tag or commit of a Hugging Face id.", None)
    served_model_name: tuple[str, ...] = setting(
        "What clients call the model; several may be given, of which answers have the first.", (),
        unset="the model's name",
    )  # fmt: skip
    tokenizer: str | None = setting(
        "Where routers find the tokenizer: a folder on their host or a Hugging Face id.", None, unset="the model's"
    )
    dtype: str = setting(
        "auto (the checkpoint's), float32, bfloat16 or float16.", "auto",
        synonyms={"half": "float16", "float": "float32"},
    )  # fmt: skip
    device: str = setting("auto, cpu, cuda or cuda:N.", "auto")
    block_size: int = setting("Tokens a KV block; the same for every worker of a store.", 16)
    max_model_len: int | None = setting(
        "Longest prompt and answer in tokens, like 32K, or auto.", None, unset="the model's",
        synonyms={"auto": None, "-1": None},
    )  # fmt: skip
    max_num_seqs: int = setting("Sequences in one step, at most.", 64)
    max_num_batched_tokens: int = setting("Tokens in one step, at most; longer prompts go in chunks.", 512)
    max_waiting: int = setting("Sequences that may wait; more are refused.", 256)
    kv_cache_bytes: int = setting("Memory for KV pages, such as 4GiB.", 2**30)
    num_blocks: int | None = setting(
        "KV pages as a number of blocks, instead of a size.", None, name="num_gpu_blocks_override"
    )
    threads: int | None = setting("CPU threads a worker.", None, unset="the cores, shared out")

    def __post_init__(self) -> None:
        _require(bool(self.model), "the model's name is empty; give `demo`, a folder or a Hugging Face id")
        require_least(self, 1, "block_size", "max_num_seqs", "max_num_batched_tokens", "max_waiting")
        require_least(self, 1, "max_model_len", "num_blocks", "threads")
        if not all(self.served_model_name):
            raise WrongValue(self, "served_model_name", "is empty; give a name, or leave it out")
        require_word(self, "dtype", "auto", "float32", "bfloat16", "float16")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise WrongValue(self, "device", f"is {self.device!r}; use auto, cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """A prefill or decode process. `single_flight_wait_s` bounds one wait for somebody else's fill."""

    role: str
    engine: EngineConfig
    listen: str = setting(
        "unix:/path or host:port; others than loopback need --certs.", example="unix:/run/kvferry/worker"
    )
    certs: Path | None = setting(
        "Folder with ca.pem and this role's certificate and key; over TCP all is TLS then. See `kvferry certs`.", None,
        metavar="DIR", unset="none",
    )  # fmt: skip
    store: Path = setting(
        "Unix socket of this host's store node.", follows="store.socket", example="/run/kvferry/store"
    )
    single_flight_wait_s: float = setting("How long to wait for a prefix that somebody else is computing.", 20.0)
    drain_s: float = setting("On SIGTERM, how long requests under way may take to finish.", 30.0)
    failpoints: tuple[str, ...] = setting(
        "For tests: NAME=stop|kill|sleep:SECONDS, with @N on the N-th hit.", (), name="failpoint"
    )

    def __post_init__(self) -> None:
        check_worker_address(self.listen, self.certs)
        require_least(self, 0, "single_flight_wait_s", "drain_s")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The HTTP front. `max_local_prefill`: up to so many uncached prompt tokens are computed by decode itself."""

    model: str | None = setting(
        "Model whose tokenizer is loaded at the start; those of others are when their workers come.", None,
        follows="engine.model", unset="none",
    )  # fmt: skip
    prefill: tuple[str, ...] = setting("Address of a prefill worker; may be repeated.", (), metavar="ADDRESS")
    decode: tuple[str, ...] = setting(
        "Address of a decode worker; may be repeated.", metavar="ADDRESS", example="unix:/run/kvferry/worker"
    )
    store: Path = setting(
        "Unix socket of this host's store node.", follows="store.socket", example="/run/kvferry/store"
    )
    certs: Path | None = setting(
        "Folder with ca.pem, router.pem and router.key; over TCP all is TLS then. See `kvferry certs`.", None,
        metavar="DIR", unset="none",
    )  # fmt: skip
    revision: str | None = setting("Branch, tag or commit of a Hugging Face id.", None, follows="engine.revision")
    host: str = setting("Address to listen on; others than loopback need a tenants file.", "127.0.0.1")
    port: int = setting("Port of the API.", 8000)
    admin_host: str = setting("Address of /metrics and the operators' pages.", "127.0.0.1")
    admin_port: int = setting("Port of /metrics and the operators' pages.", 8001)
    tenants_file: Path | None = setting(
        "Who may ask; see `kvferry keys`.", None, secret=True, unset="one tenant and no keys"
    )
    max_local_prefill: int = setting(
        "Up to so many prompt tokens that are not cached are computed by decode itself.",
        64,
        name="max_local_prefill_length",
    )
    seal: str = setting(
        "Blocks are encrypted: auto (where there are tenants, or workers beyond loopback), on or off.", "auto"
    )
    generation_config: str = setting(
        "Whose sampling parameters count where a client sends none: auto, the model's own generation_config.json, or "
        "vllm, those that change nothing.",
        "auto",
    )
    admission_s: float = setting("How long a request may wait for a decode worker to admit it.", 60.0)
    node_wait_s: float = setting("How long a request may wait for a worker to be there.", 20.0)
    request_s: float = setting("How long a request may take in all.", 600.0)
    max_concurrent: int = setting("Requests under way, at most.", 512)
    max_bodies_bytes: int = setting("Bodies of the requests under way, at most, together.", 2**28)
    drain_s: float = setting("On SIGTERM, how long requests under way may take to finish.", 4.0)

    @property
    def sealed(self) -> bool:
        """Whether this router wants blocks sealed. A store that other hosts reach wants it in any case."""
        beyond = any(not is_local(address) for address in (*self.prefill, *self.decode))
        return self.seal == "on" or (self.seal == "auto" and (beyond or self.tenants_file is not None))

    def __post_init__(self) -> None:
        require_word(self, "seal", "auto", "on", "off")
        _require(self.seal != "off" or self.tenants_file is None,
                 "blocks of several tenants are sealed; --seal off is for a router without a tenants file")  # fmt: skip
        for address in (*self.prefill, *self.decode):
            check_worker_address(address, self.certs)
        _require(bool(self.decode), "a router needs at least one decode address")
        check_port(self, "port")
        check_port(self, "admin_port")
        _require(self.port == 0 or self.port != self.admin_port or self.host != self.admin_host,
                 f"the API and the admin pages cannot both be at {self.host}:{self.port}; give another --admin-port",
                 )  # fmt: skip
        require_least(self, 0, "max_local_prefill", "admission_s", "node_wait_s", "request_s", "drain_s")
        require_least(self, 1, "max_concurrent", "max_bodies_bytes")
        require_word(self, "generation_config", "auto", "vllm")
        if self.tenants_file is None and not is_loopback(self.host):
            raise ConfigError(
                f"without a tenants file everyone who reaches {self.host} would share one tenant; give --tenants-file "
                "(make one with `kvferry keys create TENANT --tenants-file FILE`) or listen on 127.0.0.1"
            )
