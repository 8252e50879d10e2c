"""One `continue` on a decode node, and the `fill` on a prefill node that feeds it.

The fill opens once the continue is admitted; each of its reports is relayed; its first token goes out at once.
The fill stays open, and its blocks leased, until decode says that it has them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import grpc

from kvferry.common.clock import Clock
from kvferry.common.errors import DeadlineExceeded, Internal, KvferryError, Overloaded, Unavailable
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.sampling import TokenLogprobs
from kvferry.common.wire import error_of, logprobs_from_wire, why_ended
from kvferry.router.accounting import Metrics, Record
from kvferry.router.nodes import Node, Nodes
from kvferry.router.placement import Placement

FILL_ATTEMPTS = 3
TOO_LONG = "the request took longer than it may; ask for fewer tokens, or for more time if you set a timeout"
TOO_SLOW = (
    "the client reads more slowly than the answer is written, and this server cannot hold what is between them; read "
    "faster, or ask for fewer tokens"
)
HELD = 2**18  # tokens and log probabilities that wait for a client, in one handover
LINGER_S = 0.8  # closing a connection frees everything behind it within a second

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one choice to send. `finish_reason` is set in its last piece; `logprobs`, where they were asked for,
    has one entry a token. Or, before any token of any choice, what is told of the prompt's next tokens."""

    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    choice: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def weight_of(piece: Piece) -> int:
    """How many tokens and log probabilities are in it; those of a prompt, which are bounded elsewhere, apart."""
    return len(piece.token_ids) + sum(1 + len(one.top) for one in piece.logprobs)


def piece_of(tokens: pb.Tokens) -> Piece:
    told = tuple(map(logprobs_from_wire, tokens.logprobs)) if tokens.logprobs else ()
    return Piece(tuple(tokens.token_ids), tokens.finish_reason or None, tokens.choice, told)


class _DecodeEnded(Exception):
    """The continue is over, so there is nobody to relay to; why, its receiver tells."""


class Handover:
    """Owns both calls and the tasks that serve them, from `open` to `close`. It is for as many choices as the sequence
    asks for."""

    def __init__(self, sequence: pb.Sequence, placement: Placement, nodes: Nodes, record: Record, metrics: Metrics):
        self._sequence, self._placement, self._nodes = sequence, placement, nodes
        self._record, self._metrics = record, metrics
        self._continue = placement.decode.stub.Continue()
        self._choice = sequence.sampling.choice
        self._going_on = set(range(self._choice, self._choice + (sequence.sampling.n or 1)))
        self._subscription = placement.decode.subscription
        self._stream = self._subscription.add(self._hear)
        self._out: asyncio.Queue[Piece | KvferryError | None] = asyncio.Queue()  # None: it is admitted
        self._held = 0  # of what is in `_out`
        self._aborted: KvferryError | None = None
        self._restored = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._counted, self._filling = ExitStack(), ExitStack()
        self._counted.enter_context(placement.decode.stream())
        if placement.prefill is not None:  # from now on, so that others placed at the same time go elsewhere
            self._filling.enter_context(placement.prefill.stream())

    async def open(self, admission_s: float) -> None:
        """Open `continue`, wait until it is admitted, then open the fill. Raises Overloaded or Unavailable."""
        opening = pb.ContinueOpen(
            sequence=self._sequence,
            expects_fill=self._placement.prefill is not None,
            subscriber=self._subscription.subscriber,
            stream=self._stream,
        )
        self._tasks.append(asyncio.create_task(self._await_end()))
        try:
            async with asyncio.timeout(admission_s):
                with suppress(_DecodeEnded):  # why, its end tells
                    await self._write(pb.ContinueCommand(open=opening))
                first = await self._out.get()
        except TimeoutError as error:
            raise Overloaded(f"the decode node did not admit the request within {admission_s:g} s") from error
        if first is not None:
            raise first if isinstance(first, KvferryError) else Internal("decode gave tokens before it admitted")
        if self._placement.prefill is not None:
            self._tasks.append(asyncio.create_task(self._feed(self._placement.prefill)))

    @property
    def ended(self) -> bool:
        """Whether `pieces` has given the last piece of every choice that is wanted."""
        return not self._going_on

    async def pieces(self, clock: Clock, give_up: float) -> AsyncIterator[Piece]:
        """The tokens as they come, the first from whoever has it first. Raises what ended the attempt."""
        too_long = DeadlineExceeded(TOO_LONG)
        alarm = asyncio.get_running_loop().call_later(max(give_up - clock.now(), 0.001), self.abort, too_long)
        try:
            while self._going_on:
                piece = await self._out.get()
                if self._aborted is not None:
                    raise self._aborted
                if isinstance(piece, KvferryError):
                    raise piece
                self._held -= weight_of(piece)
                if piece.finish_reason is not None:
                    self._going_on.discard(piece.choice)
                yield piece
        finally:
            alarm.cancel()

    def _hear(self, event: pb.ContinueEvent | None) -> None:
        """Decode's events: its tokens go out; that the blocks have arrived lets the fill go."""
        kind = event and event.WhichOneof("event")
        if kind == "tokens":
            self._give(piece_of(event.tokens))
        elif kind == "prompt_logprobs":
            told = tuple(map(logprobs_from_wire, event.prompt_logprobs.tokens))
            self._out.put_nowait(Piece((), prompt_logprobs=told))
        elif kind == "admitted":
            self._out.put_nowait(None)
        elif kind == "restored":
            self._record.restores[self._choice] = event.restored.reuse
            self._restored.set()
        elif kind == "finished":  # of which nobody takes notice, unless the last tokens did not come
            self._out.put_nowait(Unavailable("the decode node finished before the last token"))
        elif event is None:
            self._fail(Unavailable("the connection to the decode node broke"))

    def _give(self, piece: Piece) -> None:
        """To whoever takes the pieces. When too many wait for it, it gets none any more, and decode makes none."""
        self._held += weight_of(piece)
        if self._held <= HELD:
            self._out.put_nowait(piece)
        elif self._aborted is None:
            self.abort(Overloaded(TOO_SLOW))
            self._subscription.remove(self._stream)
            self._continue.cancel()

    async def _await_end(self) -> None:
        """Decode's call; unless it ends well, nothing comes after it."""
        try:
            await self._continue
        except grpc.aio.AioRpcError as error:
            self._fail(error_of(error))
        finally:
            self._restored.set()

    def _fail(self, error: KvferryError) -> None:
        self._out.put_nowait(self._noted(error))
        self._restored.set()

    def _noted(self, error: KvferryError) -> KvferryError:
        """Decode's error; where it means that the node is not there, nothing more is placed on it for now."""
        if isinstance(error, Unavailable):
            self._nodes.mark_gone(self._placement.decode)
        return error

    async def _feed(self, prefill: Node) -> None:
        """Have the sequence filled. A fill that breaks goes to another node; after the last, decode computes."""
        progress = pb.FillProgress()
        tried: list[Node] = []
        node: Node | None = prefill
        try:
            while node is not None and len(tried) < FILL_ATTEMPTS:
                if tried:
                    self._filling.close()
                    self._filling.enter_context(node.stream())
                tried.append(node)
                try:
                    await self._fill(node, progress)
                    return
                except (grpc.aio.AioRpcError, KvferryError) as error:
                    self._note_broken_fill(node, error_of(error) if isinstance(error, grpc.aio.AioRpcError) else error)
                decode = self._placement.decode
                partners = self._nodes.partners(decode) if decode.ready else []
                node = next((n for n in partners if n not in tried), None)
            progress.done = True
            await self._write(pb.ContinueCommand(progress=progress))
        except _DecodeEnded:
            return
        except Exception:
            log.exception("relaying a fill failed")
            self._out.put_nowait(Internal("the router failed on this request; its log has the cause"))
        finally:
            self._filling.close()

    def _note_broken_fill(self, node: Node, error: KvferryError) -> None:
        log.warning("the fill on %s broke: %s", node.address, error)
        self._metrics.failed_attempts.labels("prefill").inc()
        self._record.note_broken_fill()
        if isinstance(error, Unavailable):
            self._nodes.mark_gone(node)

    async def _fill(self, node: Node, progress: pb.FillProgress) -> None:
        """One fill, relayed into `progress`, held open until decode has its blocks."""
        fill = node.stub.Fill()
        try:
            await fill.write(pb.FillCommand(open=self._sequence))
            while (report := await fill.read()) is not grpc.aio.EOF:
                await self._take(report, progress)
                if report.done:
                    break
            if not progress.done:
                raise await why_ended(fill)
            await self._restored.wait()
            await self._let_go(fill)
        finally:
            fill.cancel()

    async def _let_go(self, fill: grpc.aio.StreamStreamCall) -> None:
        """Decode has the blocks: the fill may end. All that it was for is done, so it may as well break."""
        try:
            await fill.done_writing()
            await fill.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            log.debug("a fill broke after it was done: %s", error)

    async def _take(self, report: pb.FillReport, progress: pb.FillProgress) -> None:
        """The first tokens go to the client at once, and only once; then decode hears how far the fill is, unless they
        end the request. (A second fill may choose others in bf16: those that were sent count.)"""
        self._record.note_fill(self._choice, report)
        if report.first_tokens and not progress.first_tokens:
            progress.first_tokens.extend(report.first_tokens)
            for choice, first in enumerate(report.first_tokens, start=self._choice):
                told = (logprobs_from_wire(first.logprobs),) if first.HasField("logprobs") else ()
                self._give(Piece((first.token_id,), first.finish_reason or None, choice, told))
        progress.committed_blocks, progress.holder = report.committed_blocks, report.holder
        progress.done = report.done
        going_on = [first for first in progress.first_tokens if not first.finish_reason]
        if going_on or not progress.first_tokens:
            await self._write(pb.ContinueCommand(progress=progress))

    async def _write(self, command: pb.ContinueCommand) -> None:
        try:
            async with self._writing:
                await self._continue.write(command)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise _DecodeEnded from error

    def end_choice(self, choice: int) -> None:
        """The client has all that it wants of one choice; others go on."""
        self._going_on.discard(choice)
        self._tasks.append(asyncio.create_task(self._end_choice(choice)))

    async def _end_choice(self, choice: int) -> None:
        with suppress(_DecodeEnded):
            await self._write(pb.ContinueCommand(end_choice=pb.EndChoice(choice=choice)))

    def abort(self, why: KvferryError) -> None:
        """Have `pieces` raise, whatever else waits there."""
        self._aborted = self._aborted or why
        self._out.put_nowait(why)

    async def finish(self) -> None:
        """The request ended well: give both nodes a moment to publish what they computed, then close."""
        try:
            if self._placement.prefill is not None and not self._restored.is_set():
                self._continue.cancel()  # the fill's first token was the last: decode is not needed
            await asyncio.wait(self._tasks, timeout=LINGER_S)
        finally:
            await self.close()

    async def close(self) -> None:
        """Cancel both calls and wait for the tasks. May be repeated."""
        self._subscription.remove(self._stream)
        self._continue.cancel()
        for task in self._tasks:
            task.cancel()
        try:
            if self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            self._filling.close()
            self._counted.close()
