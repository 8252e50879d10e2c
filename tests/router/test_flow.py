"""A job's choices over nodes that break: no token twice, none lost, the prompt counted once. No process behind it: each
attempt is a script of pieces."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from functools import partial

import pytest

from kvferry.common.block import BlockLayout
from kvferry.common.clock import ManualClock
from kvferry.common.config import RouterConfig
from kvferry.common.errors import DeadlineExceeded, InvalidRequest, KvferryError, Unavailable
from kvferry.common.hashing import TenantKeys
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.sampling import SamplingParams, TokenLogprobs
from kvferry.common.store_api import Match
from kvferry.router.accounting import Metrics, Record
from kvferry.router.flow import Flow, Job, Progress
from kvferry.router.handover import Piece
from kvferry.router.nodes import ServedModel

PROMPT = [1, 2, 3, 4]
LENGTH = 6
MODEL = ServedModel("m", "m", b"f" * 32, BlockLayout(1, 1, 16, 8, "float32"), 300, 64)
Broken = Callable[[int, list[int]], int | None]


def answer(choice: int) -> list[int]:
    return [100 * (choice + 1) + position for position in range(LENGTH)]


class ScriptedFlow(Flow):
    """Its attempts give `answer`, one token of each choice in turn. `breaks(attempt, choices)`: after how many pieces
    the attempt, counted over all choices, breaks."""

    def __init__(self, breaks: Broken, error: KvferryError | None = None):
        config = RouterConfig(model="m", prefill=(), decode=("unix:/nowhere",), store="s")
        super().__init__(config, None, None, None, Metrics(), ManualClock())
        self.breaks, self.error = breaks, error or Unavailable("the connection to the node broke")
        self.asked: list[tuple[list[int], list[int]]] = []  # choices, tokens that were sent before
        self.closed = 0

    async def _ready_again(self, model, give_up):
        assert model == MODEL

    async def _attempt(self, job, record, progress, give_up):
        choices, sent = list(job.choices), list(progress.sent[job.params.choice])
        self.asked.append((choices, sent))
        left = self.breaks(len(self.asked), choices)
        try:
            for position in range(len(sent), LENGTH):
                for choice in choices:
                    if left is not None and left <= 0:
                        raise self.error
                    await asyncio.sleep(0)
                    reason = "length" if position == LENGTH - 1 else None
                    yield Piece((answer(choice)[position],), reason, choice)
                    left = left and left - 1
        finally:
            self.closed += 1


def job_of(n: int) -> Job:
    return Job("r", MODEL, TenantKeys.of(b"k" * 32), "", PROMPT, SamplingParams(max_tokens=LENGTH, n=n))


def run(flow: Flow, n: int, ends: dict[int, int] | None = None) -> tuple[dict[int, list[int]], Record]:
    """What is given out by choice. `ends`: after how many tokens the reader ends a choice."""
    job, record = job_of(n), Record("r", len(PROMPT), 0.0)

    async def main():
        progress, got = Progress(job), {choice: [] for choice in range(n)}
        async with asyncio.timeout(10), aclosing(flow.run(job, record, progress)) as pieces:
            async for piece in pieces:
                got[piece.choice] += piece.token_ids
                if len(got[piece.choice]) == (ends or {}).get(piece.choice):
                    progress.end(piece.choice)
        return got

    return asyncio.run(main()), record


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("after", range(3 * LENGTH))
def test_an_attempt_that_breaks_anywhere(n, after):
    flow = ScriptedFlow(lambda attempt, choices: after if attempt == 1 else None)
    got, record = run(flow, n)
    assert got == {choice: answer(choice) for choice in range(n)}
    assert record.attempts == (2 if after < n * LENGTH else 1)
    assert flow.closed == len(flow.asked)
    if n == 3 and after == 0:
        assert flow.asked[1] == ([0, 1, 2], []), "nothing was sent: they go on together"
    elif n == 3:
        assert all(len(choices) == 1 for choices, _ in flow.asked[1:])
        assert len(flow.asked) == 1 + min(3, 3 * LENGTH - after), "those that had ended are not asked for again"


def test_branches_break_each_by_itself():
    """The first attempt after 4 pieces, then the first try of every branch after one."""
    broken: set[int] = set()

    def breaks(attempt: int, choices: list[int]) -> int | None:
        if attempt == 1:
            return 4
        if choices[0] in broken:
            return None
        broken.add(choices[0])
        return 1

    flow = ScriptedFlow(breaks)
    got, record = run(flow, 3)
    assert got == {choice: answer(choice) for choice in range(3)}
    assert record.attempts == 3
    assert len(flow.asked) == 7


@pytest.mark.parametrize("n", [1, 3])
def test_three_attempts_are_all(n):
    flow = ScriptedFlow(lambda attempt, choices: 1)
    with pytest.raises(Unavailable):
        run(flow, n)
    assert flow.closed == len(flow.asked)
    assert max(len(sent) for _, sent in flow.asked) == 2


@pytest.mark.parametrize("error", [InvalidRequest("no"), DeadlineExceeded("late")])
def test_what_another_node_would_not_mend_is_not_tried_again(error):
    flow = ScriptedFlow(lambda attempt, choices: 4, error)
    with pytest.raises(type(error)):
        run(flow, 3)
    assert len(flow.asked) == 1


@pytest.mark.parametrize("after", [None, *range(12)])
def test_a_choice_that_its_reader_ends(after):
    """The others go on; it is not continued after a failure; nothing more comes for it."""
    flow = ScriptedFlow(lambda attempt, choices: after if attempt == 1 else None)
    got, _ = run(flow, 3, ends={1: 2})
    assert got == {0: answer(0), 1: answer(1)[:2], 2: answer(2)}
    if after is not None and after >= 5:  # its second token is the fifth piece
        assert all(choices != [1] for choices, _ in flow.asked)
    assert flow.closed == len(flow.asked)


def test_when_all_are_ended_everything_closes():
    flow = ScriptedFlow(lambda attempt, choices: None)
    got, _ = run(flow, 3, ends={0: 1, 1: 2, 2: 1})
    assert {choice: len(tokens) for choice, tokens in got.items()} == {0: 1, 1: 2, 2: 1}
    assert flow.closed == 1


def test_closing_closes_every_branch():
    flow = ScriptedFlow(lambda attempt, choices: 3 if attempt == 1 else None)

    async def main():
        job = job_of(3)
        async with aclosing(flow.run(job, Record("r", 4, 0.0), Progress(job))) as pieces:
            async for _ in pieces:
                if len(flow.asked) == 4:
                    break
        return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1
    assert flow.closed == 4


TOLD = tuple(TokenLogprobs(-float(i), i) for i in range(len(PROMPT) - 1))


class Handovers:
    """In the place of `Handover`: gives pieces from a script, and breaks at its end unless the last piece ends it."""

    def __init__(self, *scripts: list[Piece]):
        self.scripts, self.sequences, self.fills = list(scripts), [], []

    async def admitted(self, flow, job, sequence, cached, names, record, give_up, fills):
        flow._active[self] = job.keys.pseudonym
        self.sequences.append(sequence)
        self.fills.append(fills)
        return self

    ended = False

    async def pieces(self, clock, give_up):
        for piece in self.scripts.pop(0):
            yield piece
            if piece.finish_reason:
                return
        raise Unavailable("broke")

    async def close(self):
        return


def test_what_is_told_of_the_prompt_is_told_once(monkeypatch):
    """Half of it came, then it broke; another attempt tells all of it, and breaks after a token; the last need not."""
    handovers = Handovers(
        [Piece((), prompt_logprobs=TOLD[:2])],
        [Piece((), prompt_logprobs=TOLD[:1]), Piece((), prompt_logprobs=TOLD[1:]), Piece((7,))],
        [Piece((8,), "length")],
    )

    class Store:
        async def lookup(self, span, lease):
            return Match()

    config = RouterConfig(model="m", prefill=(), decode=("unix:/nowhere",), store="s")
    flow = Flow(config, None, None, Store(), Metrics(), ManualClock())
    monkeypatch.setattr(flow, "_admitted", partial(handovers.admitted, flow))

    async def ready_again(model, give_up):
        assert model == MODEL

    monkeypatch.setattr(flow, "_ready_again", ready_again)
    params = SamplingParams(max_tokens=2, prompt_logprobs=3)
    job = Job("r", MODEL, TenantKeys.of(b"k" * 32), "", PROMPT, params, priority=-5)

    async def main():
        async with aclosing(flow.run(job, Record("r", 4, 0.0), Progress(job))) as pieces:
            return [piece async for piece in pieces]

    pieces = asyncio.run(main())
    assert sum((piece.prompt_logprobs for piece in pieces), ()) == TOLD
    assert [token for piece in pieces for token in piece.token_ids] == [7, 8]
    asks = [sequence.sampling.HasField("prompt_logprobs") for sequence in handovers.sequences]
    assert asks == [True, True, False]
    assert handovers.fills == [False, False, True], "what reads no cache needs no fill"
    assert [sequence.priority for sequence in handovers.sequences] == [-5] * 3


def reuse(gpu: int, host: int, computed: int, pulled: int = 0) -> pb.Reuse:
    return pb.Reuse(gpu_tokens=gpu, host_tokens=host, computed_tokens=computed, pulled_bytes=pulled)


def test_a_prompt_counts_once_however_many_choices_go_on():
    record = Record("r", 100, 0.0)
    record.note_fill(0, pb.FillReport(started=True, done=True, reuse=reuse(0, 32, 68, 5)))
    record.restores[0] = reuse(0, 96, 4, 11)
    assert record.reused == 32
    record.note_failure(0)
    assert not record.served
    record.restores[1] = reuse(96, 0, 10)
    record.restores[2] = reuse(0, 96, 10, 7)
    record.restores[0] = reuse(0, 16, 90, 3)
    told = record.as_dict()
    assert told["reused"] == {"gpu": 0, "host": 16}, "what one of them computed, somebody computed"
    assert told["computed"] == {"prefill": 0, "decode": 84}
    assert sum(told["reused"].values()) + sum(told["computed"].values()) == 100
    assert told["bytes_pulled"] == 10
    record.restores[0] = reuse(0, 96, 10)
    assert record.reused == 32, "a failover raised the number of cached tokens"


def test_who_computes_several_choices_hears_of_an_early_end():
    """Once; not of one that came to its own end; not of the last, whose stream is closed."""
    progress, told = Progress(job_of(4)), []
    progress.tell_end = told.append
    assert progress.take(Piece((5,), "length", 0))
    progress.end(0)
    assert told == []
    progress.end(1)
    progress.end(1)
    assert told == [1]
    assert not progress.take(Piece((5,), None, 1))
    progress.end(3)
    assert told == [1, 3]
    progress.end(2)
    assert told == [1, 3]
    assert progress.over(job_of(4))
