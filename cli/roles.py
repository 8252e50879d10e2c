"""The commands that are one process each: `store`, `prefill`, `decode`, `router`. `kvferry serve` starts them.

Each looks at everything that can be wrong before it imports what takes seconds.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated

import typer

from kvferry.cli import checks
from kvferry.cli.flags import Flags
from kvferry.cli.layers import Settings
from kvferry.cli.models import find, find_text_side
from kvferry.cli.run import Parent, run_role
from kvferry.common.errors import ConfigError
from kvferry.common.process import Notifier, claim_socket_path

FLAGS = MappingProxyType(
    {
        "store": Flags(("store", "")),
        "prefill": Flags(("prefill", "engine", ""), argument="engine.model"),
        "decode": Flags(("decode", "engine", ""), argument="engine.model"),
        "router": Flags(("router", "router.limits", "")),
    }
)


STORE_EXTRA = MappingProxyType(
    {
        "print_redis_acl": Annotated[
            bool,
            typer.Option("--print-redis-acl", help="Print what Redis must allow the store's user, and end."),
        ]
    }
)


def store(settings: Settings, parent: Parent, print_redis_acl: bool = False) -> None:
    """Run this host's store node: the memory that keeps KV blocks."""
    if print_redis_acl:
        from kvferry.kvstore.redis_target import read_password, redis_acl

        user, password = (settings.values[f"store.redis_{what}"].value for what in ("user", "password_file"))
        print(redis_acl(user or "kvferry", read_password(password) if password else ""))
        return
    config = settings.of("store")
    claim_socket_path(config.socket, "the store")
    checks.check_store(config)

    async def start(notifier: Notifier, stop: asyncio.Event) -> None:
        from kvferry.kvstore import node

        await node.serve(config, notifier, stop)

    run_role("store", parent, start)


def worker(role: str) -> Callable[[Settings, Parent], None]:
    """The command of a worker; both roles have the same flags."""

    def run(settings: Settings, parent: Parent) -> None:
        config = settings.of(role, role=role, engine=settings.of("engine"))
        checks.check_certs(config.certs, role)
        checks.check_listen(config.listen, f"the {role} worker")
        found = find(config.engine.model, config.engine.revision, parent.notifier.progress)
        checks.check_model(found, config.engine)
        checks.check_memory(found, [config.engine])
        config = replace(config, engine=found.named(config.engine))

        async def start(notifier: Notifier, stop: asyncio.Event) -> None:
            notifier.progress("import", 0, 0)
            import torch

            if role == "prefill":
                from kvferry.prefill import service
            else:
                from kvferry.decode import service
            try:
                await service.serve(config, notifier, stop)
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"{found.name} does not fit the GPU's memory; try --dtype bfloat16, a smaller --kv-cache-size, "
                    "--max-num-batched-tokens or --max-num-seqs, or a smaller model"
                ) from error

        run_role(role, parent, start)

    run.__doc__ = {
        "prefill": "Run a prefill worker: it computes prompts and publishes their KV.",
        "decode": "Run a decode worker: it takes KV from the store and generates.",
    }[role]
    return run


def router(settings: Settings, parent: Parent) -> None:
    """Run the router: HTTP in, tokens out."""
    config, limits = settings.of("router"), settings.of("router.limits")
    checks.check_router(config)
    if config.model is not None:
        folder = find_text_side(config.model, config.revision, parent.notifier.progress)
        checks.check_text_side(folder, config.generation_config)
        config = replace(config, model=str(folder), revision=None)

    async def start(notifier: Notifier, stop: asyncio.Event) -> None:
        notifier.progress("import", 0, 0)
        from kvferry.router import app

        await app.serve(config, limits, notifier, stop)

    run_role("router", parent, start)
