"""What is sent to a worker is what it takes out, through the bytes of a real message."""

import asyncio
import dataclasses
import logging

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.block import DTYPE_BYTES, BlockLayout
from kvferry.common.errors import OUTCOMES, Internal, InvalidRequest, Unavailable, outcome_of
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import (
    DecodeServicer,
    DecodeStub,
    PrefillServicer,
    PrefillStub,
    add_DecodeServicer_to_server,
    add_PrefillServicer_to_server,
)
from kvferry.common.sampling import SamplingParams, TokenLogprobs
from kvferry.common.wire import (
    answers_errors,
    error_of,
    first_command,
    layout_from_wire,
    layout_to_wire,
    logprobs_from_wire,
    logprobs_to_wire,
    sampling_from_wire,
    sampling_to_wire,
    scope_from_wire,
    sequence_to_wire,
    why_ended,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=U32,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=U32,
    seed=U64,
    choice=U32,
    min_tokens=U32,
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(U32, max_size=4).map(tuple),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 100),
    logit_bias=st.lists(st.tuples(U32, st.floats(-100, 100)), max_size=3).map(tuple),
    bad_words=st.lists(st.lists(U32, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    n=st.integers(1, 2**32 - 1),
    logprobs=st.none() | U32,
    prompt_logprobs=st.none() | U32,
)
LOGPROB = st.floats(max_value=0, width=32)
LOGPROBS = st.builds(
    TokenLogprobs, logprob=LOGPROB, rank=U32, top=st.lists(st.tuples(U32, LOGPROB), max_size=3).map(tuple)
)
LAYOUTS = st.builds(
    BlockLayout,
    kv_heads=st.integers(1, 8),
    layers=st.integers(1, 99),
    block_size=st.sampled_from([1, 16, 32]),
    head_dim=st.integers(1, 256),
    dtype=st.sampled_from(list(DTYPE_BYTES)),
)


@given(SAMPLING)
def test_sampling(params):
    message = pb.Sampling.FromString(sampling_to_wire(params).SerializeToString())
    assert sampling_from_wire(message) == params


def test_no_field_of_sampling_is_forgotten():
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields == {field.name for field in pb.Sampling.DESCRIPTOR.fields}


def test_a_sender_of_fewer_fields_means_their_defaults():
    got = sampling_from_wire(pb.Sampling(max_tokens=16, temperature=1, top_p=1))
    assert got == SamplingParams()


@pytest.mark.parametrize("count", [None, 0, 3])
def test_none_logprobs_is_not_zero_logprobs(count):
    params = SamplingParams(logprobs=count, prompt_logprobs=count)
    got = sampling_from_wire(pb.Sampling.FromString(sampling_to_wire(params).SerializeToString()))
    assert (got.logprobs, got.prompt_logprobs) == (count, count)


@given(LOGPROBS)
def test_logprobs(told):
    assert logprobs_from_wire(pb.TokenLogprobs.FromString(logprobs_to_wire(told).SerializeToString())) == told


@given(told=st.lists(LOGPROBS, max_size=3), token=U32, choice=U32)
def test_messages_that_carry_logprobs(told, token, choice):
    """What each of them says comes back; what it does not say is empty, not zero."""
    wired = [logprobs_to_wire(one) for one in told]
    first = pb.FirstToken(token_id=token, finish_reason="stop", logprobs=wired[0] if wired else None)
    for kind in (pb.FillReport, pb.FillProgress):
        got = kind.FromString(kind(first_tokens=[first, pb.FirstToken()]).SerializeToString()).first_tokens
        assert (got[0].token_id, got[0].finish_reason, len(got)) == (token, "stop", 2)
        assert [logprobs_from_wire(got[0].logprobs)] == told[:1] if told else not got[0].HasField("logprobs")
        assert not got[1].HasField("logprobs")
    tokens = pb.Tokens.FromString(pb.Tokens(token_ids=[token], choice=choice, logprobs=wired).SerializeToString())
    assert (list(tokens.token_ids), tokens.choice) == ([token], choice)
    assert [logprobs_from_wire(one) for one in tokens.logprobs] == told
    event = pb.ContinueEvent(prompt_logprobs=pb.PromptLogprobs(tokens=wired))
    event = pb.ContinueEvent.FromString(event.SerializeToString())
    assert event.WhichOneof("event") == "prompt_logprobs"
    assert [logprobs_from_wire(one) for one in event.prompt_logprobs.tokens] == told


@given(LAYOUTS)
def test_layout(layout):
    assert layout_from_wire(pb.Layout.FromString(layout_to_wire(layout).SerializeToString())) == layout


@given(
    keys=st.binary(min_size=32, max_size=32).map(TenantKeys.of),
    fingerprint=st.binary(max_size=16),
    salt=st.text(max_size=5),
    layout=LAYOUTS,
    tokens=st.lists(U32, min_size=1, max_size=40),
    params=SAMPLING,
    priority=st.integers(-(2**31), 2**31 - 1),
    weight=st.floats(0.01, 1e6),
)
def test_a_worker_names_blocks_as_the_router_does(keys, fingerprint, salt, layout, tokens, params, priority, weight):
    scope = CacheScope(keys, fingerprint, layout, salt)
    sent = sequence_to_wire("id", scope, tokens, len(tokens), params, priority, weight).SerializeToString()
    got = pb.Sequence.FromString(sent)
    assert (got.request_id, list(got.token_ids), got.prompt_len) == ("id", tokens, len(tokens))
    assert (got.priority, got.weight) == (priority, weight)
    assert sampling_from_wire(got.sampling) == params
    assert scope_from_wire(got, layout) == scope
    assert scope_from_wire(got, layout).chain(tokens) == scope.chain(tokens)


class Context:
    """What grpc gives a method: `abort` ends it."""

    async def abort(self, code, details, trailing_metadata):
        self.aborted = (code, details)
        raise grpc.aio.AbortError


class Service:
    log = logging.getLogger("tests.wire")

    @answers_errors
    async def Method(self, request, context):
        yield "first"
        raise request

    @answers_errors
    async def Unary(self, request, context):
        if isinstance(request, Exception):
            raise request
        return request


def streamed(error: Exception) -> tuple[grpc.StatusCode, str]:
    async def main():
        context = Context()
        messages = Service().Method(error, context)
        assert await anext(messages) == "first"
        with pytest.raises(grpc.aio.AbortError):
            await anext(messages)
        return context.aborted

    return asyncio.run(main())


def unary(error: Exception) -> tuple[grpc.StatusCode, str]:
    async def main():
        context = Context()
        assert await Service().Unary("answer", context) == "answer"
        with pytest.raises(grpc.aio.AbortError):
            await Service().Unary(error, context)
        return context.aborted

    return asyncio.run(main())


@pytest.mark.parametrize("call", [streamed, unary])
@pytest.mark.parametrize("kind", [kind for kind in OUTCOMES if OUTCOMES[kind].grpc], ids=lambda kind: kind.__name__)
def test_an_error_of_a_method_reaches_the_caller(kind, call):
    assert call(kind("one sentence")) == (grpc.StatusCode[outcome_of(kind("")).grpc], "one sentence")


@pytest.mark.parametrize("call", [streamed, unary])
def test_a_bug_reaches_the_caller_without_its_words(caplog, call):
    status, details = call(ValueError("the prompt was: hunter2"))
    assert status is grpc.StatusCode[OUTCOMES[Internal].grpc]
    assert "ValueError" in details
    assert "hunter2" not in details
    assert "a call failed" in caplog.text


def test_the_first_command_opens():
    async def commands(*items):
        for item in items:
            yield item

    assert asyncio.run(first_command(commands(1, 2))) == 1
    with pytest.raises(Unavailable):
        asyncio.run(first_command(commands()))


class Refusing(PrefillServicer, DecodeServicer):
    log = logging.getLogger("tests.wire")

    def __init__(self, error: InvalidRequest):
        self._error = error

    @answers_errors
    async def Fill(self, request, context):
        raise self._error
        yield

    @answers_errors
    async def Continue(self, request, context):
        raise self._error


@pytest.mark.parametrize("param", ["messages[3].content", None])
def test_the_param_of_a_refusal_crosses_the_wire(param):
    async def main():
        server = grpc.aio.server()
        refusing = Refusing(InvalidRequest("no", param))
        add_PrefillServicer_to_server(refusing, server)
        add_DecodeServicer_to_server(refusing, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            read, iterated = PrefillStub(channel).Fill(), PrefillStub(channel).Fill()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in iterated:
                    pass
            with pytest.raises(grpc.aio.AioRpcError) as unary:
                await DecodeStub(channel).Continue()
            errors = [await why_ended(read), error_of(refused.value), error_of(unary.value)]
        await server.stop(0)
        del server  # while its loop runs
        return errors

    for error in asyncio.run(main()):
        assert (type(error), str(error), error.param) == (InvalidRequest, "no", param)
