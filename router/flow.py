"""One request's life, from token ids to token ids.

    chain -> look -> place -> continue (decode) admitted -> fill (prefill) opened -> progress relayed -> tokens

Any node may die at any moment. A fill that breaks is tried on another prefill node, or decode computes what is missing.
A continue that breaks is continued elsewhere from the prompt and the tokens sent so far. Closing the iterator closes
both streams, and with them everything behind the request.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from kvferry.common.clock import Clock
from kvferry.common.config import RouterConfig
from kvferry.common.errors import Internal, KvferryError, Overloaded, Unavailable
from kvferry.common.hashing import BlockName, CacheScope, TenantKeys
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.sampling import SamplingParams
from kvferry.common.store_api import BlockStore
from kvferry.common.wire import sequence_to_wire
from kvferry.router.accounting import Metrics, Record
from kvferry.router.handover import Handover, Piece
from kvferry.router.nodes import Nodes, ServedModel
from kvferry.router.placement import least_loaded, place

ATTEMPTS = 3  # the first, and two more
RETRIED = (Unavailable, Internal)
STOPPING = "this server is shutting down; try again later"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was found valid: whose it is, its tokens, how to sample. `keys` and `token_ids` are secret."""

    request_id: str
    keys: TenantKeys = field(repr=False)
    cache_salt: str = field(repr=False)
    token_ids: list[int] = field(repr=False)
    params: SamplingParams


class Flow:
    """Runs jobs over the nodes. One for a router."""

    def __init__(self, config: RouterConfig, nodes: Nodes, store: BlockStore, metrics: Metrics, clock: Clock):
        self._config, self._nodes, self._store = config, nodes, store
        self._metrics, self._clock = metrics, clock
        self._finishing: set[asyncio.Task[None]] = set()
        self._active: set[Handover] = set()
        self._stopping = False

    def stop(self) -> None:
        """End every request with an error, and take no more."""
        self._stopping = True
        for handover in self._active:
            handover.abort(Unavailable(STOPPING))

    async def run(self, job: Job, record: Record) -> AsyncIterator[Piece]:
        """Yield the job's tokens in order. Raises a KvferryError within `request_s` if it cannot be finished."""
        sent: list[int] = []
        give_up = self._clock.now() + self._config.request_s
        while True:
            record.attempts += 1
            patience = min(self._config.node_wait_s, give_up - self._clock.now())
            model = await self.ready_model(patience)  # to fail here is final
            try:
                async with aclosing(self._attempt(job, sent, record, give_up, model)) as pieces:
                    async for piece in pieces:
                        sent += piece.token_ids
                        yield piece
                        if piece.finish_reason:
                            return
            except RETRIED as error:
                if record.attempts == ATTEMPTS or self._stopping:
                    raise
                log.warning("attempt %d failed: %s", record.attempts, error, extra={"request_id": job.request_id})
                self._metrics.failed_attempts.labels("decode").inc()
                record.note_failure()

    async def _attempt(
        self, job: Job, sent: list[int], record: Record, give_up: float, model: ServedModel
    ) -> AsyncIterator[Piece]:
        tokens = job.token_ids + sent
        scope = CacheScope(job.keys, model.fingerprint, model.layout, job.cache_salt)
        names = scope.chain(tokens)
        seen = await self._store.lookup(names[: (len(tokens) - 1) // model.layout.block_size], lease=False)
        cached = len(seen.blocks) * model.layout.block_size
        sequence = sequence_to_wire(job.request_id, scope, tokens, len(job.token_ids), job.params)

        if self._stopping:
            raise Unavailable(STOPPING)
        handover = await self._admitted(sequence, model, cached, names, record)
        self._active.add(handover)
        ended = False
        try:
            async for piece in handover.pieces(self._clock, give_up):
                ended = piece.finish_reason is not None
                yield piece
        finally:
            self._active.discard(handover)
            if ended:
                self._finish_later(handover)
            else:
                await handover.close()

    def _finish_later(self, handover: Handover) -> None:
        task = asyncio.create_task(handover.finish())
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def close(self) -> None:
        """Wait for what was left to finish behind answers that were sent."""
        await asyncio.gather(*self._finishing, return_exceptions=True)

    async def ready_model(self, patience: float) -> ServedModel:
        """The model of the least loaded decode node; waits up to `patience` s for one to come up. Raises
        Unavailable."""
        if not await self._nodes.wait_for(lambda: bool(least_loaded(self._nodes.decode)), patience):
            raise Unavailable("no decode node is ready; try again later")
        return least_loaded(self._nodes.decode)[0].model

    async def _admitted(
        self, sequence: pb.Sequence, model: ServedModel, cached: int, names: list[BlockName], record: Record
    ) -> Handover:
        """Open `continue` on the first decode node that admits it, among those that run the model."""
        refusal: KvferryError = Unavailable("no decode node is ready; try again later")
        for decode in least_loaded(self._nodes.decode):
            if not decode.ready or decode.model != model:  # it may have gone while another was asked
                continue
            placement = place(
                decode, self._nodes.partners(decode), names, len(sequence.token_ids), cached,
                self._config.max_local_prefill,
            )  # fmt: skip
            record.placements.append(placement)
            handover = Handover(sequence, placement, self._nodes, record, self._metrics)
            try:
                await handover.open(self._config.admission_s)
                return handover
            except (Overloaded, Unavailable) as error:
                refusal = error
                await handover.close()
            except BaseException:
                await handover.close()
                raise
        raise refusal
