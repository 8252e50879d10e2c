"""The HTTP front: a request in OpenAI's form in, its tokens out. Starting and stopping the router."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from aiohttp import web

from kvferry.common.clock import MonotonicClock
from kvferry.common.config import RouterConfig
from kvferry.common.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    KvferryError,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
    outcome_of,
)
from kvferry.common.process import Notifier
from kvferry.kvstore.client import StoreClient
from kvferry.router.accounting import Metrics, Record
from kvferry.router.admin import admin_app
from kvferry.router.answers import Answer, Model, error_body, models_list, usage_of_all
from kvferry.router.choices import Part, Telling, joined, tellings
from kvferry.router.flow import Flow, Job
from kvferry.router.jobs import jobs_of
from kvferry.router.limits import Limits
from kvferry.router.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from kvferry.router.merge import side_by_side
from kvferry.router.nodes import Nodes
from kvferry.router.openai import GenerationRequest, Kind, parse_request
from kvferry.router.placement import least_loaded
from kvferry.router.quota import Grant, Quotas, blocks_for
from kvferry.router.sse import EventStream
from kvferry.router.tenants import LiveTenants, Tenant, Tenants
from kvferry.router.text import Tokenizer, load_tokenizer

READY_LOOK_S = 30.0
LAST_WORDS_S = 0.5  # for answers that say that the server stops
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger(__name__)


async def serve(config: RouterConfig, limits: Limits, notifier: Notifier, stop: asyncio.Event) -> None:
    """Run the router until `stop` is set. Raises KvferryError with one sentence when it cannot start."""
    tenants = LiveTenants(config.tenants_file)
    tokenizer = await asyncio.to_thread(load_tokenizer, config.model, config.revision)
    store = StoreClient(config.store, 0, 0, "router")
    nodes, metrics, clock = Nodes(config.prefill, config.decode), Metrics(), MonotonicClock()
    flow = Flow(config, nodes, store, metrics, clock)
    front = Front(config, limits, tenants, tokenizer, nodes, flow, metrics)
    runners = []
    await store.start()
    nodes.start()
    try:
        admin = admin_app(nodes, store, metrics)
        runners.append(await listen(admin, config.admin_host, config.admin_port))
        runners.append(await listen(front.app(), config.host, config.port))
        ready = asyncio.create_task(tell_when_ready(nodes, notifier))
        watching = asyncio.create_task(tenants.watch(front.take_tenants))
        await stop.wait()
        ready.cancel()
        watching.cancel()
        await front.drain()
    finally:
        for runner in reversed(runners):
            await runner.cleanup()
        await flow.close()
        await nodes.close()
        await store.close()
        tokenizer.close()


async def tell_when_ready(nodes: Nodes, notifier: Notifier) -> None:
    """The start is over when the first request would be served."""
    while not await nodes.wait_for(lambda: not nodes.missing(), READY_LOOK_S):
        log.info("waiting: %s", nodes.missing())
    notifier.ready()


async def listen(app: web.Application, host: str, port: int) -> web.AppRunner:
    """Serve `app`; a client that goes cancels its handler. Raises ConfigError when the address is taken."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=LAST_WORDS_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    return runner


class Front:
    """The routes. Holds no state of a request."""

    def __init__(
        self,
        config: RouterConfig,
        limits: Limits,
        tenants: LiveTenants,
        tokenizer: Tokenizer,
        nodes: Nodes,
        flow: Flow,
        metrics: Metrics,
    ):
        self._config, self._tenants, self._tokenizer = config, tenants, tokenizer
        self._nodes, self._flow, self._metrics = nodes, flow, metrics
        self._limits = limits
        self._clock = MonotonicClock()
        self._quotas = Quotas(self._clock)
        self._created = int(time.time())
        self._open = 0
        self._idle = asyncio.Event()

    def take_tenants(self, tenants: Tenants, erased: frozenset[str]) -> None:
        """The tenants file has changed: other limits count, and what erased tenants have under way ends."""
        self._quotas.update(tenants.limits)
        self._flow.end_tenants(erased)

    async def drain(self) -> None:
        """Let open requests end for `drain_s`; then each of them gets an error, and no new one is taken."""
        self._idle.clear()
        if self._open:
            try:
                await asyncio.wait_for(self._idle.wait(), self._config.drain_s)
            except TimeoutError:
                log.warning("%d requests are ended by the shutdown", self._open)
        self._flow.stop()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._answer_errors], client_max_size=self._config.max_body_bytes)
        app.router.add_post("/v1/completions", lambda request: self._generate(request, "completion"))
        app.router.add_post("/v1/chat/completions", lambda request: self._generate(request, "chat"))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.on_response_prepare.append(tell_quota)
        return app

    @web.middleware
    async def _answer_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Every error in OpenAI's shape, every answer with the request's id."""
        given = request.headers.get("X-Request-Id", "")
        request["id"] = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = self._refuse(request, told_of(error, request))
        except KvferryError as error:
            response = self._refuse(request, error)
        except ConnectionResetError:
            raise  # the client went: there is nobody to answer
        except Exception as error:
            log.exception("a request failed", extra={"request_id": request["id"]})
            response = error_response(error, request["id"])
        if not response.prepared:
            response.headers["X-Request-Id"] = request["id"]
        return response

    def _refuse(self, request: web.Request, error: KvferryError) -> web.Response:
        """The answer to a request that is refused. Counted here, unless its record has counted it already."""
        outcome = outcome_of(error)
        if not request.get("counted"):
            self._metrics.requests.labels(outcome.code).inc()
        log.info("%s refused: %d %s", request.method, outcome.http, outcome.code, extra={"request_id": request["id"]})
        return error_response(error, request["id"])

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        if reason := self._nodes.missing():
            raise Unavailable(reason)
        return web.json_response({"status": "ready"})

    async def _models(self, request: web.Request) -> web.Response:
        self._tenants.authenticate(request.headers.get("Authorization"))
        ready = least_loaded(self._nodes.decode)
        models = [
            Model(id=self._config.served_model_name, created=self._created, max_model_len=node.model.max_model_len)
            for node in ready[:1]
        ]
        return web.Response(body=models_list(models), content_type="application/json")

    async def _generate(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        tenant = self._tenants.authenticate(request.headers.get("Authorization"))
        quota = request["quota"] = self._quotas.of(tenant.name, tenant.limits)
        with quota.admit() as grant:
            return await self._admitted(request, kind, tenant, grant)

    async def _admitted(self, request: web.Request, kind: Kind, tenant: Tenant, grant: Grant) -> web.StreamResponse:
        asked = parse_request(kind, await request.read(), self._limits)
        if asked.model not in (self._config.served_model_name, self._config.model):
            raise NotFound(f"the model {asked.model[:64]!r} is not served here; {self._config.served_model_name!r} is")
        if self._open >= self._config.max_concurrent:
            raise Overloaded(f"{self._open} requests are being served already; try again later")
        request["counted"] = True
        self._open += 1
        self._metrics.open_requests.set(self._open)
        arrived, outcome, records = self._clock.now(), "cancelled", []
        try:
            jobs = await self._jobs(asked, tenant, grant, request["id"])
            records += [Record(job.request_id, len(job.token_ids), arrived) for job in jobs]
            told = tellings(jobs, records, asked, self._tokenizer)
            answer = self._stream if asked.stream else self._whole
            response = await answer(request, asked, told, grant)
            outcome = "ok"
            return response
        except KvferryError as error:
            outcome = outcome_of(error).code
            raise
        except ConnectionResetError:
            log.info("the client went away", extra={"request_id": request["id"]})
            raise
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()
            self._metrics.open_requests.set(self._open)
            self._metrics.requests.labels(outcome).inc()
            for record in records:
                self._metrics.count(record)

    async def _jobs(self, asked: GenerationRequest, tenant: Tenant, grant: Grant, request_id: str) -> list[Job]:
        model = await self._flow.ready_model(self._config.node_wait_s)
        pools = [node.status.total_blocks for node in least_loaded(self._nodes.decode)]
        blocks, block_size = max(pools), model.layout.block_size
        if (most := tenant.limits.kv_blocks) is not None:
            blocks = min(blocks, most // (len(asked.prompts) * asked.n))
        jobs = await jobs_of(asked, self._limits, tenant.keys, request_id, self._tokenizer, model, blocks * block_size)
        lengths = [len(job.token_ids) for job in jobs]
        needed = [blocks_for(len(job.token_ids), job.params.max_tokens, job.params.n, block_size) for job in jobs]
        grant.take_prompts(lengths, sum(needed))
        return [replace(job, weight=tenant.limits.weight) for job in jobs]

    def _answer(self, request: web.Request, asked: GenerationRequest, told: Sequence[Telling]) -> Answer:
        shape = None
        if asked.logprobs is not None:
            of_kind = completion_logprobs if asked.kind == "completion" else chat_logprobs
            shape = partial(of_kind, top=asked.logprobs, tokenizer=self._tokenizer)
        prompts = [one.job.token_ids for one in told] if asked.return_token_ids else None
        created = int(time.time())
        return Answer(asked.kind, asked.model, request["id"], created, asked.include_usage, shape, prompts, asked.n)

    async def _whole(
        self, request: web.Request, asked: GenerationRequest, told: Sequence[Telling], grant: Grant
    ) -> web.StreamResponse:
        answer = self._answer(request, asked, told)
        async with aclosing(self._parts(asked, told, grant)) as arriving:
            parts = joined([part async for part in arriving], len(told) * asked.n)
        prompts = None
        if (top := asked.prompt_logprobs) is not None:
            prompts = [prompt_logprobs(one.job.token_ids, one.prompt_logprobs, top, self._tokenizer) for one in told]
        body = answer.whole(parts, usage_of_all([one.record for one in told]), prompts)
        return web.Response(body=body, content_type="application/json")

    async def _stream(
        self, request: web.Request, asked: GenerationRequest, told: Sequence[Telling], grant: Grant
    ) -> web.StreamResponse:
        answer = self._answer(request, asked, told)
        events = EventStream(request, {"X-Request-Id": request["id"]})
        try:
            async with aclosing(self._parts(asked, told, grant)) as parts:
                async for part in parts:
                    for chunk in answer.chunks(part):
                        await events.data(chunk)
            if asked.include_usage:
                await events.data(answer.usage_chunk(usage_of_all([one.record for one in told])))
            await events.done()
        except ConnectionResetError:
            raise
        except Exception as error:
            if not events.started:
                raise
            known = isinstance(error, KvferryError)
            log.warning(
                "a stream ended in an error: %s", error, exc_info=not known, extra={"request_id": request["id"]}
            )
            await events.error(error_body(error))
            await events.response.write_eof()
        return events.response

    async def _parts(
        self, asked: GenerationRequest, told: Sequence[Telling], grant: Grant
    ) -> AsyncGenerator[Part, None]:
        """What the choices of all prompts say, as it comes. The first prompt that fails fails the request."""
        at_once = max(1, self._limits.choices_at_once // asked.n)
        streams = [one.parts(self._flow) for one in told]
        last: dict[int, float] = {}
        async with aclosing(streams[0] if len(streams) == 1 else side_by_side(streams, at_once)) as parts:
            async for part in parts:
                if part.token_ids:
                    self._measure(part, told[0].record.arrived, last)
                    grant.take_tokens(len(part.token_ids))
                yield part

    def _measure(self, part: Part, arrived: float, last: dict[int, float]) -> None:
        """`last`: when tokens of each choice last came."""
        now = self._clock.now()
        if not last:
            self._metrics.ttft.observe(now - arrived)
        elif part.index in last:
            self._metrics.itl.observe((now - last[part.index]) / len(part.token_ids))
        last[part.index] = now


async def tell_quota(request: web.Request, response: web.StreamResponse) -> None:
    """What is left of the tenant's quota, in the headers of an answer, whether it is an error or not."""
    if (quota := request.get("quota")) is not None:
        response.headers.update(quota.headers())


def error_response(error: BaseException, request_id: str) -> web.Response:
    outcome = outcome_of(error)
    headers = {"X-Request-Id": request_id}
    retry_after_s = getattr(error, "retry_after_s", None) or outcome.retry_after_s
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    if outcome.http == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(status=outcome.http, body=error_body(error), content_type="application/json", headers=headers)


def told_of(error: web.HTTPException, request: web.Request) -> KvferryError:
    """What aiohttp itself refuses, as ours."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowed(f"{request.method} is not a method of {request.path}; use {error.headers['Allow']}")
    if isinstance(error, web.HTTPNotFound):
        return NotFound(f"there is no {request.path} here; see /v1/completions, /v1/chat/completions, /v1/models")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return TooLarge(f"the body is larger than the {request.app._client_max_size} bytes this server takes")
    if isinstance(error, web.HTTPRequestTimeout):
        return DeadlineExceeded("the request did not arrive in time")
    return InvalidRequest(error.reason)
