"""What is looked at before anything is loaded, so that a bad start is told at once."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from kvferry.cli.models import Found
from kvferry.common.config import EngineConfig, RouterConfig
from kvferry.common.errors import ConfigError
from kvferry.common.process import available_memory, claim_socket_path

GIB = 2**30
NVIDIA = Path("/dev/nvidiactl")  # there where the driver is


def open_port(host: str, port: int, flag: str) -> int:
    """The port, or a free one for 0. Raises ConfigError if it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listener:
            return listener.getsockname()[1]
    except OSError as error:
        known = error.errno is not None and error.errno > 0  # create_server adds to the text, getaddrinfo has its own
        reason = os.strerror(error.errno) if known else error.strerror
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; give another {flag}") from error


def check_router(config: RouterConfig) -> None:
    """Raise ConfigError if the router's ports are taken or its tenants file is not right."""
    if config.tenants_file is not None:
        from kvferry.router.tenants import Tenants

        Tenants.load(config.tenants_file)
    open_port(config.host, config.port, "--port")
    open_port(config.admin_host, config.admin_port, "--admin-port")


def check_listen(address: str, what: str) -> None:
    """Raise ConfigError if a worker's address is taken; remove the socket that a dead one left."""
    if address.startswith("unix:"):
        claim_socket_path(Path(address.removeprefix("unix:")), what)
    else:
        host, _, port = address.rpartition(":")
        open_port(host.strip("[]"), int(port), "--listen")


def check_memory(found: Found, engines: Sequence[EngineConfig], store_bytes: int = 0) -> None:
    """Raise ConfigError if workers on the CPU, and a store beside them, need more memory than there is. What a GPU has
    is seen when the model is loaded onto it."""
    engines = [one for one in engines if one.device == "cpu" or (one.device == "auto" and not NVIDIA.exists())]
    if not engines:
        return
    weights = found.weight_bytes(engines[0].dtype)
    pages = 0 if engines[0].num_blocks else engines[0].kv_cache_bytes
    needed, available = len(engines) * (weights + pages) + store_bytes, available_memory()
    if needed <= available:
        return
    parts = f"{weights / GIB:.1f} GiB of weights and {pages / GIB:.1f} GiB of KV pages"
    parts += f" for each of {len(engines)} workers" if len(engines) > 1 else ""
    parts += f", and {store_bytes / GIB:.1f} GiB of store" if store_bytes else ""
    ways = ["--dtype bfloat16"] if found.weight_bytes("bfloat16") < weights else []
    ways += ["a smaller --kv-cache-size", *(["--store-size"] if store_bytes else []), "or a smaller model"]
    raise ConfigError(
        f"{found.name} does not fit: {parts} are {needed / GIB:.1f} GiB, and this host has {available / GIB:.1f} GiB "
        f"of memory available; try {', '.join(ways)}"
    )
