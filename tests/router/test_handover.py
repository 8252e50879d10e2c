"""A continue over real gRPC, on a decode node that does what a script says: however it ends, its request is told."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc
import pytest

from kvferry.common.clock import MonotonicClock
from kvferry.common.errors import Internal, KvferryError, Overloaded, Unavailable
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import DecodeServicer, add_DecodeServicer_to_server
from kvferry.common.wire import answers_errors, first_command
from kvferry.decode.subscriber import Subscriber
from kvferry.router import handover as handover_module
from kvferry.router.accounting import Metrics, Record
from kvferry.router.handover import Handover
from kvferry.router.nodes import Nodes
from kvferry.router.placement import Placement

Script = Callable[["Scripted", Callable[..., None]], Awaitable[None]]


class Scripted(DecodeServicer):
    log = logging.getLogger("tests.handover")

    def __init__(self, script: Script):
        self._script = script
        self.subscriber = Subscriber()
        self.deaf = False
        self.ended = asyncio.Event()

    async def Watch(self, request, context):
        while True:
            yield pb.WorkerStatus(role="decode")
            await asyncio.sleep(1)

    async def Subscribe(self, subscription, context):
        async for message in self.subscriber.messages():
            if self.deaf:
                return
            yield message

    @answers_errors
    async def Continue(self, commands, context):
        stream = (await first_command(commands)).open.stream
        self.commands = commands
        try:
            await self._script(self, lambda **event: self.subscriber.send(pb.ContinueEvent(stream=stream, **event)))
            await self.subscriber.flushed()
            return pb.ContinueEnd()
        finally:
            self.ended.set()


def token(number: int, reason: str = "") -> dict[str, pb.Tokens]:
    return {"tokens": pb.Tokens(token_ids=[number], finish_reason=reason)}


def hand_over(
    tmp_path,
    script: Script,
    admission_s: float = 10.0,
    n: int = 1,
    ends: dict[int, int] | None = None,
    late: bool = False,
) -> tuple[list[int], KvferryError | None, bool]:
    """The tokens that came, what they ended in, and whether the node is still taken to be there. `ends`: after which
    token which choice is not wanted any more. `late`: nothing is taken before the node's call has ended."""

    async def main():
        service, server = Scripted(script), grpc.aio.server()
        add_DecodeServicer_to_server(service, server)
        address = f"unix:{tmp_path}/decode"
        server.add_insecure_port(address)
        await server.start()
        nodes = Nodes((), (address,))
        nodes.start()
        (node,) = nodes.decode
        assert await nodes.wait_for(lambda: node.ready, 10)
        sequence = pb.Sequence(token_ids=[1, 2], sampling=pb.Sampling(n=n))
        handover = Handover(sequence, Placement(node, None, 0), nodes, Record("r", 2, 0.0), Metrics())
        got, error = [], None
        clock = MonotonicClock()
        try:
            await handover.open(admission_s)
            if late:
                await service.ended.wait()
            async for piece in handover.pieces(clock, clock.now() + 20):
                got += piece.token_ids
                if ends and (choice := ends.pop(got[-1], None)) is not None:
                    handover.end_choice(choice)
        except KvferryError as caught:
            error = caught
        there = node.status is not None
        await (handover.finish() if handover.ended else handover.close())
        await service.ended.wait()  # the node hears of its end, whatever it was
        await nodes.close()
        await server.stop(0)
        del server  # while its loop runs
        return got, error, there

    async def in_time():
        async with asyncio.timeout(30):
            return await main()

    return asyncio.run(in_time())


async def forever() -> None:
    await asyncio.Event().wait()


def test_to_its_end(tmp_path):
    async def script(service, tell):
        tell(admitted=pb.Admitted())
        tell(**token(5))
        await asyncio.sleep(0)
        tell(**token(6, "length"))
        tell(finished=pb.Finished())

    assert hand_over(tmp_path, script) == ([5, 6], None, True)


def test_a_refusal(tmp_path):
    async def script(service, tell):
        raise Overloaded("there is no room")

    got, error, there = hand_over(tmp_path, script)
    assert (got, type(error), str(error), there) == ([], Overloaded, "there is no room", True)


def test_no_admission_in_time(tmp_path):
    async def script(service, tell):
        await forever()

    got, error, there = hand_over(tmp_path, script, admission_s=0.2)
    assert (got, type(error), there) == ([], Overloaded, True)
    assert "within 0.2 s" in str(error)


def test_an_error_after_tokens(tmp_path):
    async def script(service, tell):
        tell(admitted=pb.Admitted())
        tell(**token(5))
        await service.subscriber.flushed()
        raise ValueError("a bug")

    got, error, there = hand_over(tmp_path, script)
    assert (type(error), there) == (Internal, True)
    assert got in ([5], []), "what was under way when it broke may be lost, and is computed again"


def test_only_the_subscription_breaks(tmp_path):
    """The call itself would go on: it is given up, and the node hears that."""

    async def script(service, tell):
        tell(admitted=pb.Admitted())
        tell(**token(5))
        await service.subscriber.flushed()
        service.deaf = True
        tell(**token(6))
        await forever()

    got, error, there = hand_over(tmp_path, script)
    assert (got, type(error), there) == ([5], Unavailable, False)


@pytest.mark.parametrize("tokens", [0, 1])
def test_it_finishes_too_early(tmp_path, tokens):
    """A node that breaks its word must not leave a request hanging."""

    async def script(service, tell):
        tell(admitted=pb.Admitted())
        for number in range(tokens):
            tell(**token(number))
        tell(finished=pb.Finished())

    got, error, there = hand_over(tmp_path, script)
    assert (got, type(error), there) == (list(range(tokens)), Unavailable, True)
    assert "before the last token" in str(error)


def test_tokens_before_admission(tmp_path):
    async def script(service, tell):
        tell(**token(5))
        await forever()

    got, error, _ = hand_over(tmp_path, script)
    assert (got, type(error)) == ([], Internal)


@pytest.mark.parametrize("too_late", [False, True])
def test_a_choice_that_is_not_wanted_any_more(tmp_path, too_late):
    """The node is told; `too_late`: when the choice has come to its own end meanwhile."""

    async def script(service, tell):
        tell(admitted=pb.Admitted())
        tell(tokens=pb.Tokens(token_ids=[10], choice=0))
        tell(tokens=pb.Tokens(token_ids=[20], choice=1))
        async for command in service.commands:
            assert command.end_choice.choice == 1
            break
        if too_late:
            tell(tokens=pb.Tokens(token_ids=[21], choice=1, finish_reason="length"))
        tell(tokens=pb.Tokens(token_ids=[11], choice=0))
        tell(tokens=pb.Tokens(token_ids=[12], choice=0, finish_reason="length"))
        tell(finished=pb.Finished())

    got, error, there = hand_over(tmp_path, script, n=2, ends={20: 1})
    assert (got, error, there) == ([10, 20, *([21] if too_late else []), 11, 12], None, True)


@pytest.mark.parametrize(("logprobs", "held"), [(0, 999), (4, 5999)])
def test_what_waits_for_a_client_is_bounded(tmp_path, logprobs, held, monkeypatch):
    """Decode is told to make no more, whether or not the client reads on; it hears why when it does."""
    monkeypatch.setattr(handover_module, "HELD", held)
    told = pb.TokenLogprobs(logprob=-1.0, top_ids=[7] * logprobs, top_logprobs=[-1.0] * logprobs)

    async def script(service, tell):
        tell(admitted=pb.Admitted())
        for _ in range(1000):
            tell(tokens=pb.Tokens(token_ids=[7], logprobs=[told] if logprobs else []))
        await forever()

    got, error, there = hand_over(tmp_path, script, late=True)
    assert (got, type(error), there) == ([], Overloaded, True)
    assert "reads more slowly" in str(error)


def test_whoever_reads_on_may_have_as_much_as_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(handover_module, "HELD", 1500)

    async def script(service, tell):
        tell(admitted=pb.Admitted())
        for number in range(40):
            tell(tokens=pb.Tokens(token_ids=[number] * 50, finish_reason="length" if number == 39 else ""))
            await service.subscriber.flushed()
            await asyncio.sleep(0.01)
        tell(finished=pb.Finished())

    got, error, _ = hand_over(tmp_path, script)
    assert (len(got), error) == (2000, None)
