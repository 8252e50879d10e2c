"""What is looked at before anything is loaded or started, so that a bad start is told at once. None of it needs torch
or transformers."""

import errno
import os
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from kvferry.cli.layers import EXAMPLE, Settings, Value
from kvferry.cli.models import Found
from kvferry.cli.settings import SECTIONS, SETTINGS
from kvferry.common.config import EngineConfig, RouterConfig, StoreConfig
from kvferry.common.errors import ConfigError
from kvferry.common.process import available_memory, claim_socket_path
from kvferry.common.values import size_text

GIB = 2**30
NVIDIA = Path("/dev/nvidiactl")  # there where the driver is
TOKENIZERS = ("tokenizer*", "vocab*", "*.model")  # `load_tokenizer` sees whether they are any good
GPUS = (NVIDIA, *map(Path, ("/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/kfd")))  # what torch calls cuda


def check_values(settings: Settings) -> None:
    """Raise ConfigError for a wrong value of any section, as the command that takes it would. What is required and not
    given is no fault here: an example stands in for it."""
    values = dict(settings.values)
    for setting in SETTINGS.values():
        if setting.required and values[setting.path].value is None:
            values[setting.path] = Value(setting.parse(setting.field.metadata["example"]), EXAMPLE)
    complete = Settings(values, settings.names)
    for section in SECTIONS:
        own = {"role": section, "engine": complete.of("engine")} if section in ("prefill", "decode") else {}
        complete.of(section, **own)


def open_port(host: str, port: int, flag: str) -> int:
    """The port, or a free one for 0. Raises ConfigError if it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listener:
            return listener.getsockname()[1]
    except OSError as error:
        known = error.errno is not None and error.errno > 0  # create_server adds to the text, getaddrinfo has its own
        reason = os.strerror(error.errno) if known else error.strerror
        wrong_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        another = flag.replace("port", "host") if wrong_host else flag
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; give another {another}") from error


def check_router(config: RouterConfig) -> None:
    """Raise ConfigError if the router's ports are taken, or its tenants file or certificate is not right."""
    if config.tenants_file is not None:
        from kvferry.router.tenants import Tenants

        Tenants.load(config.tenants_file)
    check_certs(config.certs, "router")
    open_port(config.host, config.port, "--port")
    open_port(config.admin_host, config.admin_port, "--admin-port")


def check_store(config: StoreConfig) -> None:
    """Raise ConfigError for what is wrong about the files and addresses by which a store meets others."""
    if config.listen is not None:
        from kvferry.kvstore.network import check_network

        check_network(config)


def check_certs(folder: Path | None, role: str) -> None:
    """Raise ConfigError if a role's certificate, where it is told of one, cannot be used."""
    if folder is not None:
        from kvferry.common.credentials import load

        load(folder, role, datetime.now(UTC))


def check_listen(address: str, what: str) -> None:
    """Raise ConfigError if a worker's address is taken; remove the socket that a dead one left."""
    if address.startswith("unix:"):
        claim_socket_path(Path(address.removeprefix("unix:")), what)
    else:
        host, _, port = address.rpartition(":")
        open_port(host.strip("[]"), int(port), "--listen")


def check_model(found: Found, engine: EngineConfig) -> None:
    """Raise ConfigError or IncompatibleNode for a model that cannot be served, or not as it is asked for, as far as its
    config.json tells."""
    from kvferry.engine.loading.architectures import check_told, kv_layout, pick_dtype
    from kvferry.engine.loading.files import told_as

    if engine.device.startswith("cuda") and not any(path.exists() for path in GPUS):
        raise ConfigError(f"--device {engine.device}: there is no GPU on this host; use --device cpu")
    with told_as(f"{found.folder} holds no usable config.json"):
        check_told(found.told, engine.max_model_len)
        dtype = pick_dtype(engine.dtype, found.told)
        if not all(getattr(found.told, name, None) for name in ("num_attention_heads", "num_hidden_layers")):
            return  # their type's defaults, which are not known here
        if not (getattr(found.told, "head_dim", None) or getattr(found.told, "hidden_size", None)):
            return
        block_bytes = kv_layout(found.told, engine.block_size, dtype).block_bytes
    if not engine.num_blocks and engine.kv_cache_bytes < block_bytes:
        raise ConfigError(
            f"--kv-cache-size {size_text(engine.kv_cache_bytes)} does not hold one block of {engine.block_size} "
            f"tokens, which is {size_text(block_bytes)} of {found.name}; give more"
        )


def check_text_side(folder: Path, generation_config: str) -> None:
    """Raise ConfigError if a model's folder has no tokenizer, or advises to sample in a way that is not right."""
    from kvferry.router.defaults import FILE, read_defaults

    if not any(file for pattern in TOKENIZERS for file in folder.glob(pattern)):
        raise ConfigError(f"the tokenizer of {folder} cannot be loaded: there is no tokenizer.json")
    if generation_config == "auto" and (folder / FILE).is_file():
        read_defaults(folder / FILE)


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
