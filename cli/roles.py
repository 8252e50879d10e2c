"""The commands that are one process each: `store`, `prefill`, `decode`, `router`. `kvferry serve` starts them."""

import asyncio
from collections.abc import Callable
from typing import Annotated

import typer

from kvferry.cli import options
from kvferry.cli.options import ENGINE, ROUTER, STORE, WORKER
from kvferry.cli.run import ProcessOptions, run_role
from kvferry.common.config import EngineConfig, RouterConfig, StoreConfig, WorkerConfig, parse_size
from kvferry.common.process import Notifier


def store(
    socket: options.StoreSocket,
    size: Annotated[str, typer.Option(help="Memory for blocks, such as 4GiB.")] = options.STORE_SIZE,
    lease_seconds: options.LeaseSeconds = STORE["lease_s"],
    notify_fd: options.NotifyFd = None,
    parent_pid: options.ParentPid = None,
    log_level: options.LogLevel = "INFO",
) -> None:
    """Run this host's store node: the memory that keeps KV blocks."""

    async def start(notifier: Notifier, stop: asyncio.Event) -> None:
        from kvferry.kvstore import node

        config = StoreConfig(socket=socket, size_bytes=parse_size(size), lease_s=lease_seconds)
        await node.serve(config, notifier, stop)

    run_role("store", ProcessOptions(notify_fd=notify_fd, parent_pid=parent_pid, log_level=log_level), start)


def worker_command(role: str) -> Callable[..., None]:
    """The command of a worker; both roles have the same flags."""

    def worker(
        model: options.Model,
        listen: Annotated[str, typer.Option(help="unix:/path or a loopback host:port.")],
        store: options.StoreSocket,
        revision: options.Revision = None,
        dtype: options.DType = ENGINE["dtype"],
        device: options.Device = ENGINE["device"],
        block_size: options.BlockSize = ENGINE["block_size"],
        max_model_len: options.MaxModelLen = None,
        max_num_seqs: options.MaxNumSeqs = ENGINE["max_num_seqs"],
        max_num_batched_tokens: options.MaxNumBatchedTokens = ENGINE["max_num_batched_tokens"],
        max_waiting: options.MaxWaiting = ENGINE["max_waiting"],
        kv_cache_size: options.KvCacheSize = options.KV_CACHE_SIZE,
        num_blocks: options.NumBlocks = None,
        threads: options.Threads = None,
        single_flight_wait_seconds: Annotated[
            float, typer.Option(help="How long to wait for a prefix that somebody else is computing.")
        ] = WORKER["single_flight_wait_s"],
        drain_seconds: options.DrainSeconds = WORKER["drain_s"],
        failpoint: Annotated[
            list[str] | None, typer.Option(help="For tests: NAME=stop|kill|sleep:SECONDS, with @N on the N-th hit.")
        ] = None,
        notify_fd: options.NotifyFd = None,
        parent_pid: options.ParentPid = None,
        log_level: options.LogLevel = "INFO",
    ) -> None:
        async def start(notifier: Notifier, stop: asyncio.Event) -> None:
            from kvferry.cli.models import resolve

            if role == "prefill":
                from kvferry.prefill import service
            else:
                from kvferry.decode import service

            engine = EngineConfig(
                model=resolve(model)[0],
                revision=revision,
                dtype=dtype,
                device=device,
                block_size=block_size,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_waiting=max_waiting,
                kv_cache_bytes=parse_size(kv_cache_size),
                num_blocks=num_blocks,
                threads=threads,
            )
            config = WorkerConfig(
                role=role,
                engine=engine,
                listen=listen,
                store=store,
                single_flight_wait_s=single_flight_wait_seconds,
                drain_s=drain_seconds,
                failpoints=tuple(failpoint or ()),
            )
            await service.serve(config, notifier, stop)

        run_role(role, ProcessOptions(notify_fd=notify_fd, parent_pid=parent_pid, log_level=log_level), start)

    worker.__doc__ = {
        "prefill": "Run a prefill worker: it computes prompts and publishes their KV.",
        "decode": "Run a decode worker: it takes KV from the store and generates.",
    }[role]
    return worker


def router(
    model: Annotated[str, typer.Option(help=options.MODEL_HELP)],
    decode: Annotated[list[str], typer.Option(metavar="ADDRESS", help="A decode worker; may be repeated.")],
    store: options.StoreSocket,
    prefill: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS", help="A prefill worker; may be repeated.")
    ] = None,
    revision: options.Revision = None,
    served_model_name: options.ServedModelName = None,
    host: options.Host = ROUTER["host"],
    port: options.Port = ROUTER["port"],
    admin_host: options.AdminHost = ROUTER["admin_host"],
    admin_port: options.AdminPort = ROUTER["admin_port"],
    tenants_file: options.TenantsFile = None,
    max_local_prefill_length: options.MaxLocalPrefillLength = ROUTER["max_local_prefill"],
    admission_seconds: Annotated[
        float, typer.Option(help="How long a request may wait for a decode worker to admit it.")
    ] = ROUTER["admission_s"],
    node_wait_seconds: Annotated[
        float, typer.Option(help="How long a request may wait for a worker to be there.")
    ] = ROUTER["node_wait_s"],
    request_seconds: Annotated[float, typer.Option(help="How long a request may take in all.")] = ROUTER["request_s"],
    max_body_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest request body.")] = options.MAX_BODY_SIZE,
    max_concurrent: Annotated[int, typer.Option(help="Requests under way, at most.")] = ROUTER["max_concurrent"],
    drain_seconds: options.DrainSeconds = ROUTER["drain_s"],
    notify_fd: options.NotifyFd = None,
    parent_pid: options.ParentPid = None,
    log_level: options.LogLevel = "INFO",
) -> None:
    """Run the router: HTTP in, tokens out."""

    async def start(notifier: Notifier, stop: asyncio.Event) -> None:
        from kvferry.cli.models import resolve
        from kvferry.router import app

        path, name = resolve(model)
        config = RouterConfig(
            model=path,
            served_model_name=served_model_name or name,
            prefill=tuple(prefill or ()),
            decode=tuple(decode),
            store=store,
            revision=revision,
            host=host,
            port=port,
            admin_host=admin_host,
            admin_port=admin_port,
            tenants_file=tenants_file,
            max_local_prefill=max_local_prefill_length,
            admission_s=admission_seconds,
            node_wait_s=node_wait_seconds,
            request_s=request_seconds,
            max_body_bytes=parse_size(max_body_size),
            max_concurrent=max_concurrent,
            drain_s=drain_seconds,
        )
        await app.serve(config, notifier, stop)

    run_role("router", ProcessOptions(notify_fd=notify_fd, parent_pid=parent_pid, log_level=log_level), start)
