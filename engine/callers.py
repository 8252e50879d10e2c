"""Who may call a worker: by the role in the caller's certificate. Over a unix socket there is none: whoever may open
the socket's file may call."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

import grpc

from kvferry.common import certs
from kvferry.common.config import WorkerConfig
from kvferry.common.credentials import Credentials, LiveCredentials
from kvferry.common.errors import NotAllowed, outcome_of

MAY_CALL: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "Watch": frozenset({"router", "doctor"}),
        "Fill": frozenset({"router"}),
        "Continue": frozenset({"router"}),
        "Subscribe": frozenset({"router"}),
        "Forget": frozenset({"router"}),
    }
)
HANDLERS = MappingProxyType(
    {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
    }
)

log = logging.getLogger(__name__)


def live_credentials(config: WorkerConfig) -> LiveCredentials | None:
    """A worker's own; None where it needs none, which are a unix socket and, without `--certs`, loopback. Raises
    ConfigError."""
    if config.certs is None or config.listen.startswith("unix:"):
        return None
    return LiveCredentials(config.certs, config.role)


def server_credentials(live: LiveCredentials) -> grpc.ServerCredentials:
    """For a server that speaks only to who has a certificate of its CA. Connections made after `live` has changed get
    the new certificate; those that are open go on."""
    given = live.now

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Called before each handshake, on a thread of gRPC."""
        nonlocal given
        if (now := live.now) is given:
            return None
        given = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(_configuration(given), changed, require_client_authentication=True)


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(credentials.key, credentials.chain)], credentials.roots)


class OnlyRoles(grpc.aio.ServerInterceptor):
    """Refuses a call of a role that is not named for it in MAY_CALL, and any call that is not named there."""

    async def intercept_service(
        self, continuation: Callable[..., Awaitable[grpc.RpcMethodHandler | None]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(details)
        if handler is None:
            return None
        name = details.method.rpartition("/")[2]
        kind, make = HANDLERS[handler.request_streaming, handler.response_streaming]
        answer = getattr(handler, kind)

        async def answered(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await _check(name, context)
            return await answer(request, context)

        async def streamed(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await _check(name, context)
            async with aclosing(answer(request, context)) as messages:
                async for message in messages:
                    yield message

        checked = streamed if handler.response_streaming else answered
        return make(checked, handler.request_deserializer, handler.response_serializer)


async def _check(method: str, context: grpc.aio.ServicerContext) -> None:
    """End the call unless its caller may make it."""
    uris = [uri.decode("utf-8", "replace") for uri in context.auth_context().get("peer_uri", ())]
    role, allowed = certs.role_among(uris), MAY_CALL.get(method, frozenset())
    if role in allowed:
        return
    who = f"the role {role}" if role else "a certificate without a role"
    error = NotAllowed(f"{who} may not call {method}; {' and '.join(sorted(allowed)) or 'nobody'} may")
    log.warning("a call from %s is refused: %s", context.peer(), error)
    await context.abort(getattr(grpc.StatusCode, outcome_of(error).grpc), str(error))
