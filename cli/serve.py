"""`kvferry serve MODEL`: a whole system on one host, every part its own process."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli import options
from kvferry.cli.options import ENGINE, ROUTER, STORE
from kvferry.cli.progress import Bars, Lines, display
from kvferry.cli.run import plain_errors
from kvferry.cli.supervisor import ChildSpec, Supervisor
from kvferry.common.clock import MonotonicClock
from kvferry.common.config import RouterConfig, parse_size
from kvferry.common.errors import ConfigError
from kvferry.common.process import Note, die_with_parent, usable_cores
from kvferry.common.telemetry import setup_logging

ROUTER_DRAIN_S = 1.5  # less than the supervisor's patience, so that the router ends its streams itself
SAME_SIGNAL_S = 0.3  # a process and its group are often both told; that is one wish

Extra = list[str] | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `serve` starts. The sockets lie in `folder`, which is private to this run."""

    folder: Path
    model: str
    served_model_name: str
    host: str
    port: int
    admin_port: int
    prefill: int
    decode: int
    store_size: str
    lease_seconds: float
    threads: int | None
    worker_flags: tuple[str, ...]
    router_flags: tuple[str, ...]
    tenants_file: Path | None
    log_level: str
    store_args: tuple[str, ...]
    prefill_args: tuple[str, ...]
    decode_args: tuple[str, ...]

    @property
    def store_socket(self) -> Path:
        return self.folder / "store"

    def addresses(self, role: str, count: int) -> list[str]:
        return [f"unix:{self.folder / role}-{number}" for number in range(count)]


def serve(
    model: options.Model,
    host: options.Host = ROUTER["host"],
    port: options.Port = ROUTER["port"],
    admin_port: options.AdminPort = ROUTER["admin_port"],
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 1,
    store_size: Annotated[str, typer.Option(metavar="SIZE", help="Memory for the block store.")] = options.STORE_SIZE,
    kv_cache_size: options.KvCacheSize = options.KV_CACHE_SIZE,
    num_blocks: options.NumBlocks = None,
    served_model_name: options.ServedModelName = None,
    revision: options.Revision = None,
    dtype: options.DType = ENGINE["dtype"],
    device: options.Device = ENGINE["device"],
    block_size: options.BlockSize = ENGINE["block_size"],
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = ENGINE["max_num_seqs"],
    max_num_batched_tokens: options.MaxNumBatchedTokens = ENGINE["max_num_batched_tokens"],
    threads: options.Threads = None,
    tenants_file: options.TenantsFile = None,
    max_local_prefill_length: options.MaxLocalPrefillLength = ROUTER["max_local_prefill"],
    lease_seconds: options.LeaseSeconds = STORE["lease_s"],
    log_level: options.LogLevel = "INFO",
    parent_pid: options.ParentPid = None,
    store_arg: Annotated[Extra, typer.Option(help="One more argument for the store; may be repeated.")] = None,
    prefill_arg: Annotated[Extra, typer.Option(help="One more argument for prefill workers.")] = None,
    decode_arg: Annotated[Extra, typer.Option(help="One more argument for decode workers.")] = None,
    router_arg: Annotated[Extra, typer.Option(help="One more argument for the router.")] = None,
) -> None:
    """Run a whole system on this host: store, prefill and decode workers, and the router."""
    with plain_errors("serve"):
        setup_logging("serve", log_level)
        if parent_pid is not None:
            die_with_parent(parent_pid)
        shown = display()
        try:
            from kvferry.cli.models import resolve

            path, name = resolve(model, lambda done, total: shown.show("demo", Note("making the model", done, total)))
            folder = private_folder()
            try:
                plan = Plan(
                    folder=folder,
                    model=path,
                    served_model_name=served_model_name or name,
                    host=host,
                    port=open_port(host, port, "--port"),
                    admin_port=open_port(ROUTER["admin_host"], admin_port, "--admin-port"),
                    prefill=prefill,
                    decode=decode,
                    store_size=store_size,
                    lease_seconds=lease_seconds,
                    threads=threads,
                    worker_flags=flags(
                        revision=revision,
                        dtype=dtype,
                        device=device,
                        block_size=block_size,
                        max_model_len=max_model_len,
                        max_num_seqs=max_num_seqs,
                        max_num_batched_tokens=max_num_batched_tokens,
                        kv_cache_size=kv_cache_size,
                        num_gpu_blocks_override=num_blocks,
                    ),
                    router_flags=(
                        *flags(revision=revision, max_local_prefill_length=max_local_prefill_length),
                        *(router_arg or ()),
                    ),
                    tenants_file=tenants_file,
                    log_level=log_level,
                    store_args=tuple(store_arg or ()),
                    prefill_args=tuple(prefill_arg or ()),
                    decode_args=tuple(decode_arg or ()),
                )
                check(plan)
                command = (sys.executable, os.path.abspath(sys.argv[0]))
                asyncio.run(_serve(stages(plan, command, usable_cores()), plan, shown))
            finally:
                shutil.rmtree(folder)
        finally:
            shown.close()


def check(plan: Plan) -> None:
    """Raise ConfigError for what the children would refuse, before any is started."""
    parse_size(plan.store_size)
    RouterConfig(
        model=plan.model,
        served_model_name=plan.served_model_name,
        prefill=tuple(plan.addresses("prefill", plan.prefill)),
        decode=tuple(plan.addresses("decode", plan.decode)),
        store=plan.store_socket,
        host=plan.host,
        tenants_file=plan.tenants_file,
    )


def stages(plan: Plan, command: Sequence[str], cores: int) -> list[list[ChildSpec]]:
    """The processes, in the order of their start. `command`: how this program is called."""
    logs = flags(log_level=plan.log_level)
    prefill, decode = plan.addresses("prefill", plan.prefill), plan.addresses("decode", plan.decode)
    shares = [plan.threads] * (len(prefill) + len(decode)) if plan.threads else shared_out(cores, len(prefill + decode))
    store = ChildSpec("store", (*command, "store", *flags(socket=plan.store_socket, size=plan.store_size,
                      lease_seconds=plan.lease_seconds), *logs, *plan.store_args))  # fmt: skip

    def worker(role: str, number: int, address: str, threads: int, extra: tuple[str, ...]) -> ChildSpec:
        own = flags(listen=address, store=plan.store_socket, threads=threads)
        return ChildSpec(f"{role}-{number}", (*command, role, plan.model, *own, *plan.worker_flags, *logs, *extra))

    workers = [
        *(worker("prefill", i, address, shares.pop(0), plan.prefill_args) for i, address in enumerate(prefill)),
        *(worker("decode", i, address, shares.pop(0), plan.decode_args) for i, address in enumerate(decode)),
    ]
    router = flags(
        model=plan.model,
        served_model_name=plan.served_model_name,
        prefill=prefill,
        decode=decode,
        store=plan.store_socket,
        host=plan.host,
        port=plan.port,
        admin_port=plan.admin_port,
        tenants_file=plan.tenants_file,
        drain_seconds=ROUTER_DRAIN_S,
    )
    front = ChildSpec("router", (*command, "router", *router, *logs, *plan.router_flags), restart=False)
    return [[store], [*workers, front]]


def flags(**values: object) -> tuple[str, ...]:
    """`max_len=5` as `--max-len=5`; nothing for None; a list gives one flag for each of its items."""
    items = [(name, item) for name, value in values.items() for item in (value if isinstance(value, list) else [value])]
    return tuple(f"--{name.replace('_', '-')}={item}" for name, item in items if item is not None)


def shared_out(cores: int, workers: int) -> list[int]:
    """CPU threads for each worker: every core once, the first workers one more where it does not divide."""
    return [max(1, cores // workers + (number < cores % workers)) for number in range(workers)]


def private_folder() -> Path:
    """A new folder for this user alone with a short path (that of a unix socket has 107 bytes at most)."""
    of_user = Path(f"/run/user/{os.getuid()}")
    parent = of_user if os.access(of_user, os.W_OK | os.X_OK) else Path("/tmp")
    return Path(tempfile.mkdtemp(prefix="kvferry-", dir=parent))


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


async def _serve(processes: list[list[ChildSpec]], plan: Plan, shown: Bars | Lines) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    first_at = 0.0

    def on_signal() -> None:
        nonlocal first_at
        if not stop.is_set():
            first_at = loop.time()
            stop.set()
        elif loop.time() - first_at > SAME_SIGNAL_S:
            hurry.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    await Supervisor(processes, shown.show, MonotonicClock()).run(stop, hurry, partial(_say_ready, plan, shown))


def _say_ready(plan: Plan, shown: Bars | Lines) -> None:
    shown.close()
    host = f"[{plan.host}]" if ":" in plan.host else plan.host
    gib = parse_size(plan.store_size) / 2**30
    print(f"kvferry is ready: http://{host}:{plan.port}/v1  model {plan.served_model_name}  "
          f"({plan.prefill} prefill, {plan.decode} decode, store {gib:.1f} GiB; metrics: "
          f"http://127.0.0.1:{plan.admin_port}/metrics)", flush=True)  # fmt: skip
