"""The operators' listener, apart from the clients': metrics for Prometheus, what is there as JSON, and the probes."""

import asyncio
import dataclasses
from importlib.metadata import version
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvferry.common.store_api import BlockStore, StoreStats
from kvferry.router.accounting import Metrics
from kvferry.router.conflicts import conflicts
from kvferry.router.guard import guard
from kvferry.router.limits import Limits
from kvferry.router.nodes import Node, Nodes
from kvferry.router.probes import Probes
from kvferry.router.refusals import INDEX
from kvferry.router.sse import as_json

NODE_GAUGES = (
    "waiting",
    "running",
    "waiting_tokens",
    "free_blocks",
    "total_blocks",
    "streams",
    "tasks",
    "without_store",
)
NODE_COUNTERS = ("preemptions", "pulled_bytes", "published_bytes", "bad_blocks")
STORE_COUNTERS = (
    "published",
    "brought",
    "sent",
    "already_there",
    "publish_dropped",
    "late_commits",
    "evicted",
    "erased",
    "bad_blocks",
    "lookups",
    "blocks_looked_up",
    "blocks_found",
)


PAGES = {
    "/metrics": "for Prometheus: requests, tokens, latencies, and the numbers of each worker and the store",
    "/nodes": "each worker and the store now, what is missing, and workers that do not go together",
    "/health": "200 as long as this router lives",
    "/ready": "200 as soon as it can answer; `missing` has what it does without",
}


def admin_app(nodes: Nodes, store: BlockStore, metrics: Metrics, probes: Probes, limits: Limits) -> web.Application:
    async def show_index(request: web.Request) -> web.Response:
        return as_json({"kvferry": version("kvferry"), "pages": PAGES})

    async def show_metrics(request: web.Request) -> web.Response:
        scrape = CollectorRegistry()
        scrape.register(Scrape(nodes.all, await store.stats()))
        body = generate_latest(metrics.registry) + generate_latest(scrape)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def show_nodes(request: web.Request) -> web.Response:
        stats = await store.stats()
        told = {
            "missing": await probes.missing(addresses=True),
            "conflicts": list(conflicts(nodes)),
            "router": {"tasks": len(asyncio.all_tasks())},
            "nodes": [describe(node) for node in nodes.all],
            "store": stats and msgspec.structs.asdict(stats) | {"boot_id": stats.boot_id.hex()},
        }
        return web.json_response(told)

    app = web.Application(middlewares=[guard(limits, None)])
    app[INDEX] = "/"
    handlers = (show_metrics, show_nodes, probes.health, probes.ready_for_operators)
    for path, handler in zip(("/", *PAGES), (show_index, *handlers), strict=True):
        app.router.add_get(path, handler)
    return app


def describe(node: Node) -> dict[str, Any]:
    told: dict[str, Any] = {"address": node.address, "role": node.role, "ready": node.ready}
    if node.problem:
        told["problem"] = node.problem
    if node.status is not None:
        told |= {field.name: getattr(node.status, field.name) for field in node.status.DESCRIPTOR.fields}
        layout = node.model.layout
        told |= {"fingerprint": node.status.fingerprint.hex(), "layout": dataclasses.asdict(layout)}
        told |= {"other_names": list(node.status.other_names)}
    return told


class Scrape(Collector):
    """The nodes' and the store's numbers at one moment."""

    def __init__(self, nodes: list[Node], stats: StoreStats | None):
        self._nodes, self._stats = nodes, stats

    def collect(self) -> list[Metric]:
        up = GaugeMetricFamily("kvferry_node_up", "Whether a node is ready", labels=["role", "address"])
        families: list[Metric] = [up]
        for node in self._nodes:
            up.add_metric([node.role, node.address], float(node.ready))
        for name in (*NODE_GAUGES, *NODE_COUNTERS):
            kind = CounterMetricFamily if name in NODE_COUNTERS else GaugeMetricFamily
            family = kind(f"kvferry_node_{name}", f"{name} of a worker", labels=["role", "address"])
            for node in self._nodes:
                if node.status is not None:
                    family.add_metric([node.role, node.address], float(getattr(node.status, name)))
            families.append(family)
        families.append(GaugeMetricFamily("kvferry_store_up", "Whether the store answers", float(bool(self._stats))))
        if self._stats and self._stats.directory != "none":
            up, told = self._stats.directory == "up", "Whether the directory (Redis) answers the store"
            families.append(GaugeMetricFamily("kvferry_store_directory_up", told, float(up)))
        for name, value in (msgspec.structs.asdict(self._stats) if self._stats else {}).items():
            if isinstance(value, int):
                kind = CounterMetricFamily if name in STORE_COUNTERS else GaugeMetricFamily
                families.append(kind(f"kvferry_store_{name}", f"{name} of the store", value))
        return families
