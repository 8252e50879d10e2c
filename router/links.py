"""A connection to a worker: with the certificates that it was made with, and what came over it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from kvferry.common import certs
from kvferry.common.credentials import Credentials
from kvferry.common.handshake import why_refused
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.proto.worker_pb2_grpc import DecodeStub, PrefillStub
from kvferry.common.wire import CHANNEL_OPTIONS, KEEPALIVE
from kvferry.router.subscription import Subscription

OPTIONS = (
    *CHANNEL_OPTIONS,
    *KEEPALIVE,
    ("grpc.enable_http_proxy", 0),  # a proxy would see tenants' keys: to loopback they go as they are
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)


class Link:
    """One channel. `status` is None while the worker cannot be reached over it; `subscription` has what a decode node's
    continues give. What uses it is counted, so that it can be closed when nothing does."""

    def __init__(self, address: str, role: str, credentials: Credentials | None):
        """`credentials`: of who calls; a unix socket needs none."""
        self.secure = credentials is not None and not address.startswith("unix:")
        self.status: pb.WorkerStatus | None = None
        self.heard = asyncio.Event()  # a status has come, and its stream goes on
        self.subscription = Subscription()
        self.problem = ""  # why the worker and we cannot speak, for a person
        self.tasks: list[asyncio.Task[None]] = []  # who listens to the worker, for as long as the link is there
        self._address, self._role, self._credentials = address, role, credentials
        self._uses = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self._open()

    def _open(self) -> None:
        if self.secure:
            shown = self._credentials
            secret = grpc.ssl_channel_credentials(shown.roots, shown.key, shown.chain)
            options = (*OPTIONS, ("grpc.ssl_target_name_override", certs.server_name(self._role)))
            self._channel = grpc.aio.secure_channel(self._address, secret, options=options)
        else:
            self._channel = grpc.aio.insecure_channel(self._address, options=OPTIONS)
        self._stub = PrefillStub(self._channel) if self._role == "prefill" else DecodeStub(self._channel)

    async def redial(self) -> None:
        """Begin anew, after a worker was not to be spoken to: gRPC would try again and again by itself."""
        await self._channel.close()
        self._open()

    async def close(self) -> None:
        """gRPC closes the connection when nobody has a call of it any more, be it over or not: a task has one."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks.clear()
        await self._channel.close()

    @property
    def shown(self) -> bytes:
        """The certificate that we show there, in PEM; empty without one."""
        return self._credentials.chain if self.secure else b""

    @property
    def ready(self) -> bool:
        return (self._role == "prefill" or self.subscription.open) and self.status is not None

    async def why_refused(self) -> str:
        """What is wrong between the worker and us, as far as a handshake tells; empty if nothing is."""
        if self._address.startswith("unix:"):
            return ""
        return await why_refused(self._address, self._role, self._credentials)

    # -- the calls, as a stub has them ---------------------------------------------------------------------------

    def Watch(self, request: pb.WatchRequest) -> grpc.aio.UnaryStreamCall:
        return self._stub.Watch(request)

    def Subscribe(self, request: pb.Subscription) -> grpc.aio.UnaryStreamCall:
        return self._stub.Subscribe(request)

    def Fill(self) -> grpc.aio.StreamStreamCall:
        return self._counted(self._stub.Fill())

    def Continue(self) -> grpc.aio.StreamUnaryCall:
        return self._counted(self._stub.Continue())

    async def forget(self, tenant: str, timeout_s: float) -> None:
        """Have the worker drop a tenant's blocks. Raises AioRpcError."""
        await self._counted(self._stub.Forget(pb.ForgetRequest(tenant=tenant), timeout=timeout_s))

    def _counted(self, call: Any) -> Any:
        self._use(1)
        call.add_done_callback(lambda _: self._use(-1))
        return call

    @contextmanager
    def used(self) -> Iterator[None]:
        self._use(1)
        try:
            yield
        finally:
            self._use(-1)

    def _use(self, more: int) -> None:
        self._uses += more
        if self._uses:
            self._unused.clear()
        else:
            self._unused.set()

    async def unused(self) -> None:
        """Wait until nothing uses it."""
        await self._unused.wait()
