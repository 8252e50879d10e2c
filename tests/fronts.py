"""A router's listeners over nodes that nobody watches: a test says what they are."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import ClientSession
from checkpoints import byte_tokenizer

from kvferry.common.clock import MonotonicClock
from kvferry.common.config import RouterConfig
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.store_api import StoreStats
from kvferry.router.accounting import Metrics
from kvferry.router.admin import admin_app
from kvferry.router.app import Front
from kvferry.router.defaults import NO_DEFAULTS
from kvferry.router.flow import Flow
from kvferry.router.limits import Limits
from kvferry.router.listener import listen
from kvferry.router.models import Models, TextSide
from kvferry.router.nodes import Nodes
from kvferry.router.probes import Probes
from kvferry.router.tenants import LiveTenants
from kvferry.router.text import Tokenizer

CONFIG = RouterConfig(
    model="m", prefill=("127.0.0.1:1",), decode=("127.0.0.1:2",), store=Path("s"), node_wait_s=0.01
)  # fmt: skip
LAYOUT = pb.Layout(kv_heads=1, layers=1, block_size=16, head_dim=8, dtype="float32")
UP = pb.WorkerStatus(
    served_model_name="name",
    tokenizer="place",
    fingerprint=b"f" * 32,
    layout=LAYOUT,
    vocab_size=264,
    max_model_len=64,
    total_blocks=9,
)


def another(**fields: object) -> pb.WorkerStatus:
    """As UP, but for these."""
    status = pb.WorkerStatus()
    status.CopyFrom(UP)
    status.MergeFrom(pb.WorkerStatus(**fields))
    return status


class AStore:
    """One that can be away, or hang."""

    there = True
    directory, peers_away = "none", 0

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.answers.set()

    async def stats(self) -> StoreStats | None:
        await self.answers.wait()
        told = StoreStats(slots=3, directory=self.directory, peers_away=self.peers_away)
        return told if self.there else None


@dataclass
class House:
    """`api` and `admin`: the listeners' URLs."""

    nodes: Nodes
    models: Models
    store: AStore
    metrics: Metrics
    front: Front
    http: ClientSession
    api: str
    admin: str


def with_house(
    use: Callable[[House], Awaitable[None]],
    config: RouterConfig = CONFIG,
    tenants: LiveTenants | None = None,
    limits: Limits | None = None,
) -> None:
    async def main() -> None:
        nodes, metrics, store = Nodes(config.prefill, config.decode), Metrics(), AStore()
        models, bounds = Models(nodes, own_defaults=False), limits or Limits()
        models.add("place", TextSide(Tokenizer(byte_tokenizer()), NO_DEFAULTS))
        flow, probes = Flow(config, nodes, models, None, metrics, MonotonicClock()), Probes(models, store.stats)
        front = Front(config, bounds, models, tenants or LiveTenants(None), flow, metrics, probes)
        apps = (front.app(), admin_app(nodes, store, metrics, probes, bounds))
        runners = [await listen(app, "127.0.0.1", 0, bounds) for app in apps]
        urls = [f"http://127.0.0.1:{runner.addresses[0][1]}" for runner in runners]
        async with ClientSession() as http:
            await use(House(nodes, models, store, metrics, front, http, *urls))
        for runner in runners:
            await runner.cleanup()
        await nodes.close()
        models.close()

    asyncio.run(main())
