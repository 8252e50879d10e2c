"""Between our values and the protobuf messages of proto/worker.proto."""

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc

from kvferry.common.block import BlockLayout
from kvferry.common.errors import Internal, KvferryError, Unavailable, error_from_grpc, outcome_of
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.sampling import SamplingParams, TokenLogprobs

MAX_MESSAGE_BYTES = 64 * 2**20
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
# A process that is stopped, or a peer behind a broken network, keeps its connections; only an unanswered ping tells.
# With this every call breaks, on both sides: what a router asked for is freed, what a worker did is done elsewhere.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),  # the limit that counts; a minute unless it is set
    ("grpc.http2.max_pings_without_data", 0),
)
PARAM = "kvferry-param"  # in the trailing metadata of a refusal: the field at fault
SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),  # the router pings to find out who is there
    *KEEPALIVE,
)


def layout_to_wire(layout: BlockLayout) -> pb.Layout:
    return pb.Layout(
        kv_heads=layout.kv_heads,
        layers=layout.layers,
        block_size=layout.block_size,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
    )


def layout_from_wire(layout: pb.Layout) -> BlockLayout:
    return BlockLayout(layout.kv_heads, layout.layers, layout.block_size, layout.head_dim, layout.dtype)


def sampling_to_wire(params: SamplingParams) -> pb.Sampling:
    values = {name: getattr(params, name) for name in params.__slots__}
    values["logit_bias"] = [pb.TokenBias(token_id=token, bias=bias) for token, bias in params.logit_bias]
    values["bad_words"] = [pb.BadWord(token_ids=word) for word in params.bad_words]
    return pb.Sampling(**values)


def sampling_from_wire(sampling: pb.Sampling) -> SamplingParams:
    values = {name: getattr(sampling, name) for name in SamplingParams.__slots__}
    values["logit_bias"] = tuple((one.token_id, one.bias) for one in sampling.logit_bias)
    values["bad_words"] = tuple(tuple(word.token_ids) for word in sampling.bad_words)
    values["stop_token_ids"] = tuple(sampling.stop_token_ids)
    for name in ("logprobs", "prompt_logprobs"):
        values[name] = values[name] if sampling.HasField(name) else None
    for name in ("repetition_penalty", "n"):  # proto3 has no default but 0
        values[name] = values[name] or 1
    return SamplingParams(**values)


def logprobs_to_wire(told: TokenLogprobs) -> pb.TokenLogprobs:
    """Log probabilities are float32 on the wire, as they are where they come from."""
    top_ids, top_logprobs = zip(*told.top, strict=True) if told.top else ((), ())
    return pb.TokenLogprobs(logprob=told.logprob, rank=told.rank, top_ids=top_ids, top_logprobs=top_logprobs)


def logprobs_from_wire(told: pb.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(told.logprob, told.rank, tuple(zip(told.top_ids, told.top_logprobs, strict=True)))


def sequence_to_wire(
    request_id: str,
    scope: CacheScope,
    token_ids: list[int],
    prompt_len: int,
    params: SamplingParams,
    priority: int = 0,
    weight: float = 1.0,
    sealed: bool = False,
) -> pb.Sequence:
    return pb.Sequence(
        request_id=request_id,
        chain_key=scope.keys.chain,
        cache_salt=scope.cache_salt,
        fingerprint=scope.fingerprint,
        token_ids=token_ids,
        prompt_len=prompt_len,
        sampling=sampling_to_wire(params),
        priority=priority,
        weight=weight,
        seal_key=scope.keys.seal or b"",
        sealed=sealed,
    )


def scope_from_wire(sequence: pb.Sequence, layout: BlockLayout, sealed: bool = False) -> CacheScope:
    """A request's scope, whose blocks are sealed if it says so or `sealed` does."""
    seal = sequence.seal_key or None if sealed or sequence.sealed else None
    return CacheScope(TenantKeys.of(sequence.chain_key, seal), sequence.fingerprint, layout, sequence.cache_salt)


def error_of(error: grpc.aio.AioRpcError) -> KvferryError:
    """What a failed call means: the peer's own error where it sent one, `Unavailable` where the connection broke."""
    return _told(error.code(), error.details(), error.trailing_metadata())


async def why_ended(call: grpc.aio.Call) -> KvferryError:
    """What it means that a call gave EOF before it was expected to."""
    return _told(await call.code(), await call.details(), await call.trailing_metadata())


Trailing = Iterable[tuple[str, str | bytes]]  # metadata


def _told(code: grpc.StatusCode, details: str | None, trailing: Trailing | None) -> KvferryError:
    return error_from_grpc(code.name, details or "the connection to the node broke", dict(trailing or ()).get(PARAM))


def answers_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    """An RPC method, of one message or a stream of them, whose errors reach the caller as a status from the one
    table."""

    @asynccontextmanager
    async def telling(self: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        try:
            yield
        except KvferryError as error:
            await _abort(context, error)
        except Exception as error:
            self.log.exception("a call failed")
            await _abort(context, Internal(f"the node failed: {type(error).__name__}; its log has the cause"))

    if not inspect.isasyncgenfunction(method):

        @functools.wraps(method)
        async def answered(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with telling(self, context):
                return await method(self, request, context)

        return answered

    @functools.wraps(method)
    async def streamed(self: Any, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async with telling(self, context), aclosing(method(self, request, context)) as messages:
            async for message in messages:
                yield message

    return streamed


def _abort(context: grpc.aio.ServicerContext, error: KvferryError) -> Awaitable[None]:
    param = getattr(error, "param", None)
    trailing = ((PARAM, param),) if param else ()
    return context.abort(getattr(grpc.StatusCode, outcome_of(error).grpc), str(error), trailing)


async def first_command(commands: AsyncIterator[Any]) -> Any:
    """The command that opens a stream. Raises Unavailable when the peer closes it without one."""
    async for command in commands:
        return command
    raise Unavailable("the stream was closed before it was opened")
