"""The engine: schedule, run, take in the outcome, tell the streams. One event loop owns all state; only the model's
forward runs beside it, on a thread of its own, over a plan that is plain data.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError, Internal, KvferryError, NotANumber, Overloaded, Unavailable
from kvferry.common.hashing import CacheScope
from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Outcome, StepPlan
from kvferry.engine.checks import check_request
from kvferry.engine.kv_memory import KvMemory
from kvferry.engine.loading.model import LoadedModel
from kvferry.engine.page_pool import PagePool
from kvferry.engine.runner import Runner
from kvferry.engine.scheduling.scheduler import Scheduler
from kvferry.engine.sequence import Sequence, Sink, Status
from kvferry.engine.step_thread import StepThread

log = logging.getLogger(__name__)

Restore = Callable[[Sequence], Awaitable[None]]
CHECK_EVERY_S = 5.0  # at the most, when idle: it takes milliseconds for a large pool
RATE_MEMORY = 0.8  # weight of the past in the measured prefill rate


Call = tuple[Sequence, int] | KvferryError | None  # a sequence was admitted for the nth time; failed; all finished


class Engine:
    """Pages KV and generates tokens. `pool` and `memory` are shared with the transfer, on the same event loop.

    `thread` runs the steps, and should be the one that the model was loaded on: each thread that has computed with
    torch keeps a team of its own for parallel work, and two teams on the same cores slow each other's barriers down.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig, thread: StepThread | None = None):
        self.model = model
        num_blocks = config.num_blocks or config.kv_cache_bytes // model.layout.block_bytes
        if num_blocks < 1:
            raise ConfigError(f"the KV cache holds no block of {model.layout.block_bytes} bytes; enlarge it")
        self.memory = KvMemory(model.layout, num_blocks, model.device)
        self.pool = PagePool(num_blocks)
        self.scheduler = Scheduler(self.pool, config.max_num_seqs, config.max_num_batched_tokens, config.max_waiting)
        self.prefill_tokens_per_s = 0.0
        self._runner = Runner(model, self.memory.tensor)
        self._next_id = 1
        self._calls: dict[int, asyncio.Queue[Call]] = {}  # by the sequences' group
        self._wake = asyncio.Event()
        self._stopping = False
        self._changed: list[Callable[[], None]] = []
        self._thread = thread or StepThread()
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
        *,
        priority: int = 0,
        weight: float = 1.0,
    ) -> Sequence:
        """A sequence that this engine can generate from. Raises InvalidRequest with one sentence for what cannot be."""
        vocab, longest = self.model.vocab_size, self.model.max_model_len
        check_request(token_ids, prompt_len, params, weight, vocab, longest, self.scheduler.max_num_seqs)
        ends = () if params.ignore_eos else self.model.eos_token_ids
        first_id, self._next_id = self._next_id, self._next_id + params.n
        return Sequence(
            id=first_id,
            request_id=request_id,
            scope=scope,
            token_ids=list(token_ids),
            prompt_len=prompt_len,
            params=params,
            stop_ids=tuple(dict.fromkeys((*ends, *params.stop_token_ids))),
            limit=limit,
            max_model_len=longest,
            priority=priority,
            weight=weight,
        )

    async def generate(self, seq: Sequence, restore: Restore, sink: Sink) -> None:
        """Run one sequence, and those it forks into, to their ends; `sink` is told at once what each step did for them.

        `restore(seq)` is awaited after every admission (the first, and each after a preemption): it pulls what it can
        into `seq.block_table` and may append tokens that became known. Cancelling frees everything at once. Raises
        what ended it early. A sink must not raise.
        """
        if self._stopping:
            raise Unavailable("this node is shutting down")
        seq.sink = sink
        if (displaced := self.scheduler.add(seq)) is not None:
            self._end(displaced, Overloaded("this tenant's line was the longest when it was full; try again later"))
        calls = self._calls[seq.group] = asyncio.Queue()
        try:
            self._admit()
            while (call := await calls.get()) is not None:
                if isinstance(call, KvferryError):
                    raise call
                member, admission = call
                if admission == member.admissions:
                    await restore(member)
                if admission == member.admissions:
                    self.scheduler.start(member)
                    self._wake.set()
        finally:
            del self._calls[seq.group]
            for member in self.scheduler.members(seq.group):
                self.scheduler.withdraw(member)
            self._admit()

    def end_choice(self, seq: Sequence, choice: int) -> None:
        """Of a sequence that has forked, one choice is not wanted any more; when no other one goes on, `generate` is at
        its end."""
        going_on = {m.params.choice: m for m in self.scheduler.members(seq.group) if not m.withdrawn}
        if (ended := going_on.pop(choice, None)) is not None:
            self.scheduler.withdraw(ended)
            if not going_on:
                self._end(seq, None)
            self._admit()

    def _admit_soon(self) -> None:
        """Blocks have become free, perhaps long after their sequence ended: somebody may be waiting for them."""
        if not self._admitting and not self._stopping:
            self._admitting = True
            asyncio.get_running_loop().call_soon(self._admit)

    def _admit(self) -> None:
        self._admitting = False
        for seq in self.scheduler.admit():
            self._calls[seq.group].put_nowait((seq, seq.admissions))
        self._tell()

    def _tell(self) -> None:
        for callback in self._changed:
            callback()

    async def run(self) -> None:
        """The loop. Ends when `stop` is called; an error in a step fails the sequences of that step only."""
        loop = asyncio.get_running_loop()
        check_at = loop.time()
        while not self._stopping:
            plan = self.scheduler.schedule()
            self._admit()
            if plan is None:
                self._wake.clear()
                if loop.time() >= check_at:
                    self.scheduler.check_integrity()
                    check_at = loop.time() + CHECK_EVERY_S
                await self._wake.wait()
                continue
            started = time.perf_counter()
            try:
                outcome = await self._thread.run(self._runner.execute, plan)
            except Exception:
                log.exception("a step of %d rows failed", len(plan.seq_ids))
                self._fail()
                continue
            self._measure(plan, time.perf_counter() - started)
            self._take_in(outcome)
            self._admit()

    def _take_in(self, outcome: Outcome) -> None:
        """Tell the streams what a step did; those whose last sequence has come to its end are over."""
        for seq in self.scheduler.in_rows(outcome.failed_rows):
            self._end(seq, NotANumber("the model's logits are not numbers: it overflows in this dtype, or is broken"))
        for seq in self.scheduler.finish_step(outcome):
            self.scheduler.withdraw(seq)
            if not self.scheduler.members(seq.group):
                self._end(seq, None)

    def _fail(self) -> None:
        for seq in self.scheduler.abandon_step():
            self._end(seq, Internal("the model failed on this request; the node's log has the cause"))

    def _end(self, seq: Sequence, cause: KvferryError | None) -> None:
        """End the stream of a sequence, unless it has gone already."""
        if (calls := self._calls.get(seq.group)) is not None:
            calls.put_nowait(cause)

    def _measure(self, plan: StepPlan, seconds: float) -> None:
        """Keep the rate of steps that are mostly prefill; what placement reckons with."""
        if plan.num_tokens >= 4 * len(plan.seq_ids):
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
        for calls in self._calls.values():
            calls.put_nowait(Unavailable("this node is shutting down"))
        self._thread.stop()
