"""One request for text, from what was asked to the last byte of its answer."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from aiohttp import web

from kvferry.common.clock import Clock
from kvferry.common.config import RouterConfig
from kvferry.common.errors import InvalidRequest, KvferryError, outcome_of
from kvferry.common.values import counted
from kvferry.router.accounting import Metrics, Record
from kvferry.router.answers import Answer, error_body, usage_of_all
from kvferry.router.choices import Part, Telling, joined, tellings
from kvferry.router.flow import Flow, Job
from kvferry.router.jobs import jobs_of
from kvferry.router.limits import Limits
from kvferry.router.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from kvferry.router.merge import side_by_side
from kvferry.router.models import Models
from kvferry.router.nodes import ServedModel
from kvferry.router.openai import GenerationRequest
from kvferry.router.quota import Grant, blocks_for
from kvferry.router.sse import EventStream, send_json
from kvferry.router.tenants import Tenant
from kvferry.router.text import Tokenizer

INLINE_TOLD = 1000  # log probabilities; more of them are shaped in a thread
INLINE_CHARS = 2**16  # characters and token ids, as well

log = logging.getLogger(__name__)


def work_of(part: Part, answer: Answer) -> float:
    """How much it is to make bytes of a part; more than 1 would hold the event loop for too long."""
    told = sum(1 + len(one.logprobs.top) for one in part.told if one.logprobs) if part.told else 0
    return (len(part.text) + len(part.token_ids) + answer.prompt_ids_with(part)) / INLINE_CHARS + told / INLINE_TOLD


class Generator:
    """Answers requests for text. One for a router; it knows how many are open."""

    def __init__(
        self,
        config: RouterConfig,
        limits: Limits,
        models: Models,
        flow: Flow,
        metrics: Metrics,
        clock: Clock,
    ):
        self._config, self._limits, self._models = config, limits, models
        self._flow, self._metrics, self._clock = flow, metrics, clock
        self._open = 0
        self._idle = asyncio.Event()

    async def drain(self) -> None:
        """Let open requests end for `drain_s`; then each of them gets an error, and no new one is taken."""
        self._idle.clear()
        if self._open:
            try:
                await asyncio.wait_for(self._idle.wait(), self._config.drain_s)
            except TimeoutError:
                log.warning("the shutdown ends %s", counted(self._open, "request"))
        await self._flow.stop()

    async def answer(
        self, request: web.Request, asked: GenerationRequest, tenant: Tenant, grant: Grant
    ) -> web.StreamResponse:
        """Raises KvferryError as long as nothing was sent, ConnectionResetError when the client is not there."""
        request["counted"] = True
        self._open += 1
        self._metrics.open_requests.set(self._open)
        arrived, outcome, records, refused = self._clock.now(), "cancelled", [], False
        try:
            give_up = self._flow.give_up(arrived, asked.timeout_s)
            model = await self._flow.ready_model(asked.model, give_up)
            side = self._models.side_of(model.tokenizer)
            asked = replace(asked.advised(side.defaults), model=model.name)
            async with self._flow.in_time(give_up):
                jobs = await self._jobs(asked, model, side.tokenizer, tenant, grant, request["id"])
            records += [Record(job.request_id, len(job.token_ids), arrived) for job in jobs]
            told = tellings(jobs, records, asked, side.tokenizer)
            send = self._stream if asked.stream else self._whole
            response, error = await send(request, asked, told, grant)
            outcome = "ok" if error is None else outcome_of(error).code
            return response
        except KvferryError as error:
            outcome, refused = outcome_of(error).code, True
            raise
        except ConnectionResetError as error:
            log.info("the client is not there: %s", error)
            raise
        except Exception as error:
            outcome = outcome_of(error).code
            raise
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()
            self._metrics.open_requests.set(self._open)
            outcome = request.get("dropped", outcome)
            self._metrics.requests.labels(outcome).inc()
            if not refused:  # a refusal is told of elsewhere
                log.info(
                    "%s for tenant %s: %s, %s, %d generated, %.0f ms", asked.kind, tenant.keys.pseudonym, outcome,
                    counted(sum(record.prompt_tokens for record in records), "prompt token"),
                    sum(record.output_tokens for record in records), 1e3 * (self._clock.now() - arrived),
                )  # fmt: skip
            for record in records:
                self._metrics.count(record)

    async def _jobs(
        self,
        asked: GenerationRequest,
        model: ServedModel,
        tokenizer: Tokenizer,
        tenant: Tenant,
        grant: Grant,
        request_id: str,
    ) -> list[Job]:
        if (most := self._models.most_choices(model.name)) is not None and asked.n > most:
            told = f"n is {asked.n}; the workers of {model.name} give at most {counted(most, 'answer')} to a prompt"
            raise InvalidRequest(told, "n")
        pools = [node.status.total_blocks for node in self._models.decode(model.name)]
        blocks, block_size = max(pools), model.layout.block_size
        if (most := tenant.limits.kv_blocks) is not None:
            blocks = min(blocks, most // (len(asked.prompts) * asked.n))
        jobs = await jobs_of(asked, self._limits, tenant.keys, request_id, tokenizer, model, blocks * block_size)
        lengths = [len(job.token_ids) for job in jobs]
        needed = [blocks_for(len(job.token_ids), job.params.max_tokens, job.params.n, block_size) for job in jobs]
        grant.take_prompts(lengths, sum(needed))
        return [replace(job, weight=tenant.limits.weight) for job in jobs]

    def _answer(self, request: web.Request, asked: GenerationRequest, told: Sequence[Telling]) -> Answer:
        shape = None
        if asked.logprobs is not None:
            of_kind = completion_logprobs if asked.kind == "completion" else chat_logprobs
            shape = partial(of_kind, top=asked.logprobs, tokenizer=told[0].tokenizer)
        prompts = [one.job.token_ids for one in told] if asked.return_token_ids else None
        created = int(time.time())
        return Answer(asked.kind, asked.model, request["id"], created, asked.include_usage, shape, prompts, asked.n)

    async def _whole(
        self, request: web.Request, asked: GenerationRequest, told: Sequence[Telling], grant: Grant
    ) -> tuple[web.StreamResponse, None]:
        """The answer in one piece. Raises what it ended in."""
        answer = self._answer(request, asked, told)
        async with aclosing(self._parts(asked, told, grant)) as arriving:
            parts = joined([part async for part in arriving], len(told) * asked.n)
        usage, top = usage_of_all([one.record for one in told]), asked.prompt_logprobs

        def shaped() -> bytes:
            prompts = None
            if top is not None:
                prompts = [prompt_logprobs(one.job.token_ids, one.prompt_logprobs, top, one.tokenizer) for one in told]
            return answer.whole(parts, usage, prompts)

        little = top is None and sum(work_of(part, answer) for part in parts) <= 1
        body = shaped() if little else await asyncio.to_thread(shaped)
        return await send_json(request, body, self._limits.write_s, {"X-Request-Id": request["id"]}), None

    async def _stream(
        self, request: web.Request, asked: GenerationRequest, told: Sequence[Telling], grant: Grant
    ) -> tuple[web.StreamResponse, Exception | None]:
        """The answer as a stream, and the error that is its last event, if it ended in one. Raises what comes before
        the first event."""
        answer = self._answer(request, asked, told)
        events = EventStream(request, self._limits.write_s, {"X-Request-Id": request["id"]})
        try:
            async with aclosing(self._parts(asked, told, grant)) as parts:
                async for part in parts:
                    much = work_of(part, answer) > 1
                    for chunk in await asyncio.to_thread(answer.chunks, part) if much else answer.chunks(part):
                        await events.data(chunk)
            if asked.include_usage:
                await events.data(answer.usage_chunk(usage_of_all([one.record for one in told])))
            await events.done()
            return events.response, None
        except ConnectionResetError:
            raise
        except Exception as error:
            if not events.started:
                raise
            known = isinstance(error, KvferryError)
            log.warning("a stream ended in an error: %s", error, exc_info=not known)
            await events.error(error_body(error))
            return events.response, error

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
