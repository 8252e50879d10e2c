"""One request's life, from token ids to token ids.

    chain -> look -> place -> continue (decode) admitted -> fill (prefill) opened -> progress relayed -> tokens

Any node may die at any moment. A fill that breaks is tried on another prefill node, or decode computes what is missing.
A continue that breaks is continued elsewhere from the prompt and the tokens sent so far; where it was for several
choices, each goes on by itself, for they have different tokens by then. Closing the iterator closes all streams, and
with them everything behind the request.
"""

import asyncio
import logging
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from math import inf

from kvferry.common.clock import Clock
from kvferry.common.config import RouterConfig
from kvferry.common.errors import DeadlineExceeded, Internal, KvferryError, Overloaded, Unauthenticated, Unavailable
from kvferry.common.hashing import BlockName, CacheScope, Span, TenantKeys
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.sampling import SamplingParams
from kvferry.common.store_api import BlockStore
from kvferry.common.wire import sequence_to_wire
from kvferry.router.accounting import Metrics, Record
from kvferry.router.handover import TOO_LONG, Handover, Piece
from kvferry.router.merge import side_by_side
from kvferry.router.models import Models
from kvferry.router.nodes import Node, Nodes, ServedModel
from kvferry.router.placement import place

ATTEMPTS = 3  # the first, and two more
RETRIED = (Unavailable, Internal)
STOPPING = "this server is shutting down; try again later"
ERASED_END_S = 5.0  # for the requests of erased tenants
INLINE_TOKENS = 1024  # of a prompt; what is longer is worked on one by one
ERASED = "the tenant of this API key was erased"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt of a request that was found valid: whose it is, for which model, its tokens, how to sample. `keys` and
    `token_ids` are secret. Of one tenant's jobs the lower `priority` goes first; `weight` is the tenant's share among
    tenants."""

    request_id: str
    model: ServedModel
    keys: TenantKeys = field(repr=False)
    cache_salt: str = field(repr=False)
    token_ids: Sequence[int] = field(repr=False)
    params: SamplingParams
    priority: int = 0
    weight: float = 1.0
    timeout_s: float | None = None  # from its arrival; None is as long as the router allows

    @property
    def choices(self) -> range:
        return range(self.params.choice, self.params.choice + self.params.n)

    def only(self, choice: int) -> "Job":
        """The same job for one of its choices."""
        return replace(self, params=replace(self.params, choice=choice, n=1))


class Progress:
    """How far a job's answer has come. The flow notes what it gives out; who takes it may `end` a choice early."""

    def __init__(self, job: Job):
        self.sent: dict[int, list[int]] = {choice: [] for choice in job.choices}  # of the choices that go on
        self.scored = 0  # prompt tokens, besides the first, whose log probability has been given out
        self.tell_end: Callable[[int], None] | None = None  # whoever computes several choices for it

    def end(self, choice: int) -> None:
        """The choice has all that it needs: what comes for it from here on is dropped. May be repeated."""
        if self.sent.pop(choice, None) is not None and self.sent and self.tell_end is not None:
            self.tell_end(choice)

    def of(self, job: Job) -> list[int]:
        """The choices of a job that go on."""
        return [choice for choice in job.choices if choice in self.sent]

    def over(self, job: Job) -> bool:
        """Whether none of them goes on."""
        return not self.sent or self.sent.keys().isdisjoint(job.choices)

    def untouched(self, job: Job) -> bool:
        return all(self.sent.get(choice) == [] for choice in job.choices)

    def take(self, piece: Piece) -> bool:
        """Note a piece that is about to be given out; False if nothing in it is wanted."""
        if piece.token_ids:
            if piece.choice not in self.sent:
                return False
            self.sent[piece.choice] += piece.token_ids
            if piece.finish_reason:
                del self.sent[piece.choice]
        return bool(piece.token_ids or piece.prompt_logprobs)


class Flow:
    """Runs jobs over the nodes. One for a router."""

    def __init__(
        self, config: RouterConfig, nodes: Nodes, models: Models, store: BlockStore, metrics: Metrics, clock: Clock
    ):
        self._config, self._nodes, self._models, self._store = config, nodes, models, store
        self._metrics, self._clock = metrics, clock
        self._finishing: set[asyncio.Task[None]] = set()
        self._active: dict[Handover, str] = {}  # and whose they are: the tenant's pseudonym
        self._one_ended = asyncio.Event()
        self._turns = asyncio.Lock()
        self._tenants: frozenset[str] | None = None  # that there are; None is all
        self._stopping = False

    async def stop(self) -> None:
        """End every request with an error, also those that wait for a worker, and take no more."""
        self._stopping = True
        for handover in self._active:
            handover.abort(Unavailable(STOPPING))
        await self._nodes.tell()

    def take_tenants(self, pseudonyms: frozenset[str]) -> None:
        """These are the tenants there are from now on: end the requests of all others with an error. Of those that were
        there before, the workers drop all blocks."""
        erased = (self._tenants or frozenset()) - pseudonyms
        self._tenants = pseudonyms
        for handover, tenant in self._active.items():
            if tenant not in pseudonyms:
                handover.abort(Unauthenticated(ERASED))
        if erased:
            task = asyncio.create_task(self._have_forgotten(erased))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)

    async def _have_forgotten(self, erased: frozenset[str]) -> None:
        """Have all workers drop the blocks of erased tenants, once their requests have ended there."""
        with suppress(TimeoutError):  # what has not ended by then is dropped under it
            async with asyncio.timeout(ERASED_END_S):
                while not erased.isdisjoint(self._active.values()):
                    self._one_ended.clear()
                    await self._one_ended.wait()
        await asyncio.gather(*(self._nodes.forget(node, tenant) for node in self._nodes.all for tenant in erased))

    def _check_wanted(self, job: Job) -> None:
        """Raise what ends a job that is not to go on."""
        if self._stopping:
            raise Unavailable(STOPPING)
        if self._tenants is not None and job.keys.pseudonym not in self._tenants:
            raise Unauthenticated(ERASED)

    async def run(self, job: Job, record: Record, progress: Progress, attempt: int = 1) -> AsyncGenerator[Piece, None]:
        """Yield the tokens of the job's choices that go on, each choice's in order; what was asked of the prompt comes
        before them. Raises a KvferryError if it cannot be finished in time, counted from the record's arrival."""
        give_up = self.give_up(record.arrived, job.timeout_s)
        while True:
            record.attempts = max(record.attempts, attempt)
            await self._ready_again(job.model, give_up)  # to fail here is final
            if progress.over(job):
                return
            try:
                async with aclosing(self._attempt(job, record, progress, give_up)) as pieces:
                    async for piece in pieces:
                        if progress.take(piece):
                            yield piece
                        if progress.over(job):
                            return
            except RETRIED as error:
                if progress.over(job):
                    return
                if attempt == ATTEMPTS or self._stopping:
                    raise
                log.warning("attempt %d failed: %s", attempt, error)
                self._metrics.failed_attempts.labels("decode").inc()
                record.note_failure(job.params.choice)
            attempt += 1
            if job.params.n > 1 and not progress.untouched(job):
                break
        branches = [self.run(job.only(choice), record, progress, attempt) for choice in progress.of(job)]
        async with aclosing(side_by_side(branches)) as pieces:
            async for piece in pieces:
                yield piece

    async def _attempt(
        self, job: Job, record: Record, progress: Progress, give_up: float
    ) -> AsyncGenerator[Piece, None]:
        """One continue for all choices of a job, from what has been sent: of several, that is nothing."""
        model, tokens = job.model, array("I", job.token_ids)
        tokens.extend(progress.sent[job.params.choice])
        scope = CacheScope(job.keys, model.fingerprint, model.layout, job.cache_salt)
        await self._turn(len(tokens))
        params, names, cached = job.params, scope.chain(tokens), 0
        if progress.scored == len(job.token_ids) - 1:
            params = replace(params, prompt_logprobs=None)
        scores = params.prompt_logprobs is not None  # then decode computes all of the prompt, whoever has it
        if not scores:
            reusable = Span.of(names, scope.root(), end=(len(tokens) - 1) // model.layout.block_size)
            cached = len(await self._store.lookup(reusable, lease=False)) * model.layout.block_size
        await self._turn(len(tokens))
        sequence = sequence_to_wire(
            job.request_id, scope, tokens, len(job.token_ids), params, job.priority, job.weight, self._config.sealed
        )

        handover = await self._admitted(job, sequence, cached, names, record, give_up, fills=not scores)
        if job.params.n > 1:
            progress.tell_end = handover.end_choice
        scored = 0
        try:
            async for piece in handover.pieces(self._clock, give_up):
                if told := piece.prompt_logprobs:
                    piece = replace(piece, prompt_logprobs=told[max(progress.scored - scored, 0) :])
                    scored += len(told)
                    progress.scored = max(progress.scored, scored)
                yield piece
        finally:
            del self._active[handover]
            self._one_ended.set()
            progress.tell_end = None
            if handover.ended:
                self._finish_later(handover)
            else:
                await handover.close()

    async def _turn(self, tokens: int) -> None:
        """For who is about to work on so many tokens: of all such work, each turn of the loop has one piece."""
        if tokens > INLINE_TOKENS:
            async with self._turns:
                await asyncio.sleep(0)

    def _finish_later(self, handover: Handover) -> None:
        task = asyncio.create_task(handover.finish())
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def close(self) -> None:
        """Wait for what was left to finish behind answers that were sent."""
        await asyncio.gather(*self._finishing, return_exceptions=True)

    def give_up(self, arrived: float, timeout_s: float | None) -> float:
        """When a request's time is over: the client's own, within what the router allows."""
        allowed = self._config.request_s
        return arrived + (allowed if timeout_s is None else min(timeout_s, allowed))

    @asynccontextmanager
    async def in_time(self, give_up: float) -> AsyncIterator[None]:
        """For what nobody waits for any longer than until then. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(give_up - self._clock.now()):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded(TOO_LONG) from error

    async def ready_model(self, asked: str | None, give_up: float = inf) -> ServedModel:
        """The model that a request asks for, as the least loaded decode node runs it; waits a while for a worker that
        announces it and is ready, also for the first that ever comes. Raises what `Models.name_of` does, and
        DeadlineExceeded."""

        def found() -> bool:
            return self._models.settled(asked) and bool(self._models.decode(self._models.name_of(asked)))

        if not await self._wait_for(found, give_up):
            name = self._models.name_of(asked)
            raise Unavailable(f"no decode node is ready for {name}; try again later")
        return self._models.decode(self._models.name_of(asked))[0].model

    async def _ready_again(self, model: ServedModel, give_up: float) -> None:
        """Wait a while for a decode node that runs this very model: what has been sent was its answer, and goes on on
        no other. Raises Unavailable, DeadlineExceeded."""
        if not await self._wait_for(lambda: bool(self._running(model)), give_up):
            if self._models.decode(model.name):
                raise Unavailable(f"{model.name} has become another model; try again")
            raise Unavailable(f"no decode node is ready for {model.name}; try again later")

    async def _wait_for(self, found: Callable[[], bool], give_up: float) -> bool:
        """Whether it is found in the time there is. Raises DeadlineExceeded when the request's own is over, Unavailable
        when this server stops."""
        patience = min(self._config.node_wait_s, give_up - self._clock.now())
        there = await self._nodes.wait_for(lambda: self._stopping or found(), patience)
        if self._stopping:
            raise Unavailable(STOPPING)
        if not there and self._clock.now() >= give_up:
            raise DeadlineExceeded(TOO_LONG)
        return there

    def _running(self, model: ServedModel) -> list[Node]:
        """The decode nodes that run this very model, the least loaded first."""
        return [node for node in self._models.decode(model.name) if node.model == model]

    async def _admitted(
        self,
        job: Job,
        sequence: pb.Sequence,
        cached: int,
        names: list[BlockName],
        record: Record,
        give_up: float,
        fills: bool,
    ) -> Handover:
        """Open `continue` on the first decode node that admits it, among those that run the job's model, before it is
        time to `give_up`. `fills`: whether a prefill node may fill it. It is active from its opening on, until who has
        it takes it out."""
        refusal: KvferryError = Unavailable("no decode node is ready; try again later")
        for decode in self._running(job.model):
            self._check_wanted(job)
            if not decode.ready or decode.model != job.model:  # it may have gone while another was asked
                continue
            partners = self._nodes.partners(decode) if fills else []
            placement = place(
                decode, partners, names, len(sequence.token_ids), cached,
                self._config.max_local_prefill,
            )  # fmt: skip
            record.placements.append(placement)
            handover = Handover(sequence, placement, self._nodes, record, self._metrics)
            self._active[handover] = job.keys.pseudonym
            try:
                await handover.open(max(min(self._config.admission_s, give_up - self._clock.now()), 0.001))
                return handover
            except BaseException as error:
                del self._active[handover]
                await handover.close()
                if not isinstance(error, Overloaded | Unavailable):
                    raise
                if self._clock.now() >= give_up:
                    raise DeadlineExceeded(TOO_LONG) from error
                refusal = error
        self._check_wanted(job)
        raise refusal
