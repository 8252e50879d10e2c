"""The HTTP front: what the routes are. Starting and stopping the router."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import TypeVar

from aiohttp import web

from kvferry.common.clock import MonotonicClock
from kvferry.common.config import RouterConfig
from kvferry.common.credentials import LiveCredentials
from kvferry.common.errors import Unavailable
from kvferry.common.process import Notifier
from kvferry.common.values import url_of
from kvferry.kvstore.client import StoreClient
from kvferry.router.accounting import Metrics
from kvferry.router.admin import admin_app
from kvferry.router.answers import Model, encoded, models_list
from kvferry.router.flow import Flow
from kvferry.router.gate import Gate, Place
from kvferry.router.generate import Generator
from kvferry.router.guard import guard, read_body
from kvferry.router.limits import Limits
from kvferry.router.listener import connections_allowed, listen
from kvferry.router.models import Models
from kvferry.router.nodes import Nodes
from kvferry.router.openai import Kind, parse_request
from kvferry.router.openapi import openapi
from kvferry.router.probes import Probes
from kvferry.router.quota import Grant, Quotas
from kvferry.router.sse import as_json, send_json
from kvferry.router.tenants import LiveTenants, Tenant, Tenants
from kvferry.router.tokens import detokenize, parse_detokenize, parse_tokenize, tokenize
from kvferry.router.turns import Turns

READY_LOOK_S = 30.0
INLINE_BYTES = 2**16  # of a body; a larger one is parsed in a thread
THREADS = 2  # for bodies, and for answers; each more would take Python's lock from the event loop more often
T = TypeVar("T")

log = logging.getLogger(__name__)


async def serve(config: RouterConfig, limits: Limits, notifier: Notifier, stop: asyncio.Event) -> None:
    """Run the router until `stop` is set. Raises KvferryError with one sentence when it cannot start."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
    tenants = LiveTenants(config.tenants_file)
    store = StoreClient(config.store, 0, 0, "router")
    live = LiveCredentials(config.certs, "router") if config.certs else None
    nodes, metrics, clock = Nodes(config.prefill, config.decode, live), Metrics(), MonotonicClock()
    models = Models(nodes, own_defaults=config.generation_config == "auto", promised=limits.n)
    if config.model is not None:
        notifier.progress("tokenizer", 0, 0)
        await models.load(config.model, config.revision)
    flow = Flow(config, nodes, models, store, metrics, clock)
    probes = Probes(models, store.stats)
    front = Front(config, limits, models, tenants, flow, metrics, probes)
    front.take_tenants(tenants.now)
    runners = []
    await store.start()
    nodes.start()
    try:
        admin = admin_app(nodes, store, metrics, probes, limits)
        runners.append(await listen(admin, config.admin_host, config.admin_port, limits))
        runners.append(await listen(front.app(), config.host, config.port, limits, connections_allowed()))
        log.info(
            "listening on %s, operators on %s", *(url_of(*runner.addresses[0][:2]) for runner in reversed(runners))
        )
        tasks = [
            asyncio.create_task(models.follow()),
            asyncio.create_task(tell_when_ready(nodes, models, notifier)),
            asyncio.create_task(tenants.watch(front.take_tenants)),
        ]
        await stop.wait()
        for task in tasks:
            task.cancel()
        await front.generator.drain()
    finally:
        for runner in reversed(runners):
            await runner.cleanup()
        front.close()
        await flow.close()
        await nodes.close()
        await store.close()
        models.close()


async def tell_when_ready(nodes: Nodes, models: Models, notifier: Notifier) -> None:
    """The start is over when every kind of worker is there."""
    notifier.progress("wait", 0, 0)
    while not await nodes.wait_for(lambda: not models.missing(), READY_LOOK_S):
        log.info("waiting: %s", models.missing())
    notifier.ready()


class Front:
    """The routes. Holds no state of a request. Who asks is told by the API key alone: no other header has a say in
    it."""

    def __init__(
        self,
        config: RouterConfig,
        limits: Limits,
        models: Models,
        tenants: LiveTenants,
        flow: Flow,
        metrics: Metrics,
        probes: Probes,
    ):
        self._limits, self._models, self._tenants = limits, models, tenants
        self._flow, self._metrics, self._probes = flow, metrics, probes
        self._clock = clock = MonotonicClock()
        self._parsing = Turns("parse", THREADS)
        self._quotas, self._gate = Quotas(clock), Gate(config.max_concurrent, config.max_bodies_bytes)
        self.generator = Generator(config, limits, models, flow, metrics, clock)

    def take_tenants(self, tenants: Tenants) -> None:
        """These are the tenants from now on: other limits count, and what erased ones have under way ends."""
        self._gate.shared = len(tenants.limits) > 1
        self._quotas.update(tenants.limits)
        self._flow.take_tenants(tenants.pseudonyms)

    def close(self) -> None:
        self._parsing.close()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[guard(self._limits, self._metrics)], client_max_size=self._limits.body_bytes)
        app.router.add_post("/v1/completions", partial(self._generate, kind="completion"))
        app.router.add_post("/v1/chat/completions", partial(self._generate, kind="chat"))
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/v1/models/{id:.+}", self._show_model)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_get("/openapi.json", self._openapi)
        app.router.add_get("/health", self._probes.health)
        app.router.add_get("/ready", self._probes.ready)
        for method in ("GET", "POST"):  # SageMaker's
            app.router.add_route(method, "/ping", self._probes.ready)
        app.router.add_get("/version", self._version)
        app.on_response_prepare.append(tell_quota)
        return app

    async def _version(self, request: web.Request) -> web.Response:
        return as_json({"version": version("kvferry")})

    async def _list_models(self, request: web.Request) -> web.Response:
        self._authenticate(request)
        return web.Response(body=models_list(self._served()), content_type="application/json")

    async def _show_model(self, request: web.Request) -> web.Response:
        self._authenticate(request)
        self._models.name_of(name := request.match_info["id"])
        for model in self._served():
            if model.id == name:
                return as_json(model)
        raise Unavailable(f"no decode node is ready for {name}; try again later")

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        tenant, grant = self._admit(request)
        with grant, self._gate.enter(tenant.name) as place:
            asked = await self._parsed(request, tenant, place, parse_tokenize)
            model = await self._flow.ready_model(asked.model)
            tokenizer = self._models.side_of(model.tokenizer).tokenizer
            async with self._flow.in_time(self._flow.give_up(self._clock.now(), None)):
                told = await tokenize(asked, tokenizer, model.max_model_len, self._limits, grant, tenant.keys.pseudonym)
            return await self._send(request, told)

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        tenant, grant = self._admit(request)
        with grant, self._gate.enter(tenant.name) as place:
            asked = await self._parsed(request, tenant, place, parse_detokenize)
            model = await self._flow.ready_model(asked.model)
            tokenizer = self._models.side_of(model.tokenizer).tokenizer
            async with self._flow.in_time(self._flow.give_up(self._clock.now(), None)):
                told = await detokenize(asked, tokenizer, model.vocab_size, tenant.keys.pseudonym)
            return await self._send(request, told)

    async def _openapi(self, request: web.Request) -> web.StreamResponse:
        return await self._send(request, openapi(self._models.bounded(self._limits)))

    async def _send(self, request: web.Request, value: object) -> web.StreamResponse:
        return await send_json(request, encoded(value), self._limits.write_s, {"X-Request-Id": request["id"]})

    def _served(self) -> list[Model]:
        return [Model(id=name, created=since, max_model_len=longest) for name, since, longest in self._models.up()]

    def _authenticate(self, request: web.Request) -> Tenant:
        tenant = self._tenants.authenticate(request.headers.get("Authorization"))
        request["tenant"] = tenant.keys.pseudonym  # for the log
        return tenant

    def _admit(self, request: web.Request) -> tuple[Tenant, Grant]:
        """Who asks, and the request counted, before anything is done for it. Who gets the grant closes it."""
        tenant = self._authenticate(request)
        quota = request["quota"] = self._quotas.of(tenant.name, tenant.limits)
        return tenant, quota.admit()

    async def _generate(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        tenant, grant = self._admit(request)
        with grant, self._gate.enter(tenant.name) as place:
            asked = await self._parsed(request, tenant, place, partial(parse_request, kind))
            place.keep(asked.bytes)
            return await self.generator.answer(request, asked, tenant, grant)

    async def _parsed(
        self, request: web.Request, tenant: Tenant, place: Place, parse: Callable[[bytes, Limits], T]
    ) -> T:
        """What a body asks for; a large one is parsed in a thread."""
        body = await read_body(request, self._limits, place)
        if len(body) <= INLINE_BYTES:
            return parse(body, self._limits)
        return await self._parsing.run(tenant.name, partial(parse, body, self._limits))


async def tell_quota(request: web.Request, response: web.StreamResponse) -> None:
    """What is left of the tenant's quota, in the headers of an answer, whether it is an error or not."""
    if (quota := request.get("quota")) is not None:
        response.headers.update(quota.headers())
