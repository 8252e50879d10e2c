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
from kvferry.common.sampling import SamplingParams
from kvferry.common.wire import (
    answers_errors,
    first_command,
    layout_from_wire,
    layout_to_wire,
    sampling_from_wire,
    sampling_to_wire,
    scope_from_wire,
    sequence_to_wire,
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


@given(LAYOUTS)
def test_layout(layout):
    assert layout_from_wire(pb.Layout.FromString(layout_to_wire(layout).SerializeToString())) == layout


@given(
    keys=st.binary(min_size=32, max_size=32).map(TenantKeys.from_chain_key),
    fingerprint=st.binary(max_size=16),
    salt=st.text(max_size=5),
    layout=LAYOUTS,
    tokens=st.lists(U32, min_size=1, max_size=40),
    params=SAMPLING,
)
def test_a_worker_names_blocks_as_the_router_does(keys, fingerprint, salt, layout, tokens, params):
    scope = CacheScope(keys, fingerprint, layout, salt)
    sent = sequence_to_wire("id", scope, tokens, len(tokens), params).SerializeToString()
    got = pb.Sequence.FromString(sent)
    assert (got.request_id, list(got.token_ids), got.prompt_len) == ("id", tokens, len(tokens))
    assert sampling_from_wire(got.sampling) == params
    assert scope_from_wire(got, layout) == scope
    assert scope_from_wire(got, layout).chain(tokens) == scope.chain(tokens)


class Context:
    """What grpc gives a method: `abort` ends it."""

    async def abort(self, code, details):
        self.aborted = (code, details)
        raise grpc.aio.AbortError


class Service:
    log = logging.getLogger("tests.wire")

    @answers_errors
    async def Method(self, request, context):
        yield "first"
        raise request


def call(error: Exception) -> tuple[grpc.StatusCode, str]:
    async def main():
        context = Context()
        messages = Service().Method(error, context)
        assert await anext(messages) == "first"
        with pytest.raises(grpc.aio.AbortError):
            await anext(messages)
        return context.aborted

    return asyncio.run(main())


@pytest.mark.parametrize("kind", OUTCOMES, ids=lambda kind: kind.__name__)
def test_an_error_of_a_method_reaches_the_caller(kind):
    assert call(kind("one sentence")) == (grpc.StatusCode[outcome_of(kind("")).grpc], "one sentence")


def test_a_bug_reaches_the_caller_without_its_words(caplog):
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


def test_the_param_of_a_refusal_is_kept_here():
    assert InvalidRequest("no", "max_tokens").param == "max_tokens"
