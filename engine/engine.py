"""The engine: schedule, run, take in the outcome, tell the streams. One event loop owns all state; only the model's
forward runs beside it, on a thread of its own, over a plan that is plain data.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError, Internal, InvalidRequest, KvferryError, Unavailable
from kvferry.common.hashing import CacheScope
from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import StepPlan
from kvferry.engine.kv_memory import KvMemory
from kvferry.engine.model import LoadedModel
from kvferry.engine.page_pool import PagePool
from kvferry.engine.runner import Runner
from kvferry.engine.scheduler import Scheduler
from kvferry.engine.sequence import Sequence, Status

log = logging.getLogger(__name__)

Restore = Callable[[Sequence], Awaitable[None]]
RATE_MEMORY = 0.8  # weight of the past in the measured prefill rate


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did for one sequence. `token` is its next token, if the step chose one."""

    num_computed: int
    token: int | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class _Admitted:
    """The sequence has its blocks, for the `admission`-th time."""

    admission: int


class Engine:
    """Pages KV and generates tokens. `pool` and `memory` are shared with the transfer, on the same event loop."""

    def __init__(self, model: LoadedModel, config: EngineConfig):
        self.model = model
        num_blocks = config.num_blocks or config.kv_cache_bytes // model.layout.block_bytes
        if num_blocks < 1:
            raise ConfigError(f"the KV cache holds no block of {model.layout.block_bytes} bytes; enlarge it")
        self.memory = KvMemory(model.layout, num_blocks, model.device)
        self.pool = PagePool(num_blocks)
        self.scheduler = Scheduler(self.pool, config.max_num_seqs, config.max_num_batched_tokens, config.max_waiting)
        self.prefill_tokens_per_s = 0.0
        self._runner = Runner(model, self.memory.tensor)
        self._ids = itertools.count(1)
        self._events: dict[int, asyncio.Queue[Step | _Admitted | KvferryError]] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._changed: list[Callable[[], None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._admitting = False
        self.pool.on_room = self._admit_soon

    def on_change(self, callback: Callable[[], None]) -> None:
        """Have `callback` called whenever the load has changed."""
        self._changed.append(callback)

    def new_sequence(
        self,
        request_id: str,
        scope: CacheScope,
        token_ids: list[int],
        prompt_len: int,
        params: SamplingParams,
        limit: int,
    ) -> Sequence:
        """A sequence that this engine can generate from. Raises InvalidRequest with one sentence for what cannot be."""
        vocab, longest = self.model.vocab_size, self.model.max_model_len
        if not token_ids:
            raise InvalidRequest("the prompt is empty; send at least one token", "prompt")
        if not 0 < prompt_len <= len(token_ids):
            raise InvalidRequest(f"{prompt_len} prompt tokens of {len(token_ids)} in all cannot be")
        if min(token_ids) < 0 or max(token_ids) >= vocab:
            raise InvalidRequest(f"a token id is outside the model's vocabulary of {vocab}", "prompt")
        if any(not 0 <= token < vocab for token in params.stop_token_ids):
            raise InvalidRequest(f"a stop token id is outside the model's vocabulary of {vocab}", "stop_token_ids")
        if len(token_ids) >= longest:
            raise InvalidRequest(f"the prompt has {len(token_ids)} tokens; this model takes {longest - 1}", "prompt")
        ends = () if params.ignore_eos else self.model.eos_token_ids
        return Sequence(
            id=next(self._ids),
            request_id=request_id,
            scope=scope,
            token_ids=list(token_ids),
            prompt_len=prompt_len,
            params=params,
            stop_ids=tuple(dict.fromkeys((*ends, *params.stop_token_ids))),
            limit=limit,
            max_model_len=longest,
        )

    async def generate(self, seq: Sequence, restore: Restore) -> AsyncIterator[Step]:
        """Run one sequence to its end and yield what each step did.

        `restore(seq)` is awaited after every admission (the first, and each after a preemption): it pulls what it can
        into `seq.block_table` and may append tokens that became known. Closing the iterator frees everything at once.
        """
        events: asyncio.Queue[Step | _Admitted | KvferryError] = asyncio.Queue()
        if self._stopping:
            raise Unavailable("this node is shutting down")
        self.scheduler.add(seq)
        self._events[seq.id] = events
        try:
            self._admit()
            while True:
                event = await events.get()
                if isinstance(event, KvferryError):
                    raise event
                if isinstance(event, _Admitted):
                    if event.admission == seq.admissions:
                        await restore(seq)
                    if event.admission == seq.admissions:
                        self.scheduler.start(seq)
                        self._wake.set()
                    continue
                yield event
                if event.finish_reason or seq.generated_here >= seq.limit:
                    return
        finally:
            del self._events[seq.id]
            self.scheduler.withdraw(seq)
            self._admit()

    def _admit_soon(self) -> None:
        """Blocks have become free, perhaps long after their sequence ended: somebody may be waiting for them."""
        if not self._admitting and not self._stopping:
            self._admitting = True
            asyncio.get_running_loop().call_soon(self._admit)

    def _admit(self) -> None:
        self._admitting = False
        for seq in self.scheduler.admit():
            self._events[seq.id].put_nowait(_Admitted(seq.admissions))
        self._tell()

    def _tell(self) -> None:
        for callback in self._changed:
            callback()

    async def run(self) -> None:
        """The loop. Ends when `stop` is called; an error in a step fails the sequences of that step only."""
        loop = asyncio.get_running_loop()
        while not self._stopping:
            plan = self.scheduler.schedule()
            self._admit()
            if plan is None:
                self._wake.clear()
                self.scheduler.check_integrity()
                await self._wake.wait()
                continue
            started = time.perf_counter()
            try:
                tokens = await loop.run_in_executor(self._thread, self._runner.execute, plan)
            except Exception:
                log.exception("a step of %d rows failed", len(plan.rows))
                self._fail(plan)
                continue
            self._measure(plan, time.perf_counter() - started)
            for seq, token, reason in self.scheduler.finish_step(plan, tokens):
                self._events[seq.id].put_nowait(Step(seq.num_computed, token, reason))
            self._admit()
            await asyncio.sleep(0)

    def _fail(self, plan: StepPlan) -> None:
        for row in plan.rows:
            if (events := self._events.get(row.seq_id)) is not None:
                events.put_nowait(Internal("the model failed on this request; the node's log has the cause"))
        self.scheduler.abandon_step(plan)

    def _measure(self, plan: StepPlan, seconds: float) -> None:
        """Keep the rate of steps that are mostly prefill; what placement reckons with."""
        if plan.num_tokens >= 4 * len(plan.rows):
            rate = plan.num_tokens / seconds
            past = self.prefill_tokens_per_s or rate
            self.prefill_tokens_per_s = RATE_MEMORY * past + (1 - RATE_MEMORY) * rate

    @property
    def idle(self) -> bool:
        return not self.scheduler.of(Status.WAITING, Status.RESTORING, Status.RUNNING)

    def stop(self) -> None:
        """End the loop and every stream that is still open."""
        self._stopping = True
        self._wake.set()
        for events in self._events.values():
            events.put_nowait(Unavailable("this node is shutting down"))
        self._thread.shutdown(wait=False, cancel_futures=True)
