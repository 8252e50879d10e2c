"""Asks the parts of a cluster what `kvferry doctor` wants to know. Nobody keeps it waiting for long."""

import asyncio
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from http.client import HTTPException
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import grpc

from kvferry.cli.diagnosis import LocalStore, Redis, Router, Store, Way, Worker
from kvferry.common.clock import WallClock
from kvferry.common.config import is_local
from kvferry.common.credentials import Credentials
from kvferry.common.errors import ConfigError, IncompatibleNode, Unavailable
from kvferry.common.handshake import WANTS_CERTIFICATES, expiry_at
from kvferry.common.proto import worker_pb2 as pb
from kvferry.common.wire import error_of, layout_from_wire
from kvferry.kvstore import measuring, redis_pipe
from kvferry.kvstore import protocol as say
from kvferry.kvstore.link import REPLY_S, Unreachable
from kvferry.kvstore.link import Link as StoreLink
from kvferry.kvstore.measuring import reason
from kvferry.kvstore.peering import MAX_PROBE, Identity, Probe
from kvferry.kvstore.protocol import ProtocolError
from kvferry.kvstore.redis_target import KEY_PREFIX, RedisTarget
from kvferry.router.links import Link

ROUTER_S, WORKER_S, STORE_S, LINK_S, REDIS_S = 3.0, 10.0, 2.0, 6.0, 2.0
MOST_BYTES = 2**20  # of what a router says
NO_ROUTER = "what answers there is no router of ours"
ROUNDS = 5  # round trips to Redis, whose median counts
CALLER = "kvferry doctor"
WITHOUT_CERTIFICATES = "without certificates nobody speaks to it; give --certs"

clock = WallClock()


# -- routers ----------------------------------------------------------------------------------------------------------


async def look_at_router(url: str) -> Router:
    """By its API, which everybody may ask whether it is ready. Follows no proxy."""
    try:
        ready = await asyncio.to_thread(fetched, f"{url}/ready")
        release = await asyncio.to_thread(fetched, f"{url}/version")
        return Router(url=url, release=release["version"], missing=missing_in(ready))
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:  # a URLError is an OSError
        told = getattr(error, "reason", error)
        if isinstance(told, OSError):
            return Router(url=url, problem=reason(told))
        stranger = "that is its admin port; give that of its API" if await is_admin(url) else NO_ROUTER
        return Router(url=url, problem=stranger)


async def is_admin(url: str) -> bool:
    """Whether a router's admin port answers there, whose index tells its pages."""
    try:
        index = await asyncio.to_thread(fetched, f"{url}/")
        return "/metrics" in index["pages"]
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return False


def fetched(url: str) -> Any:
    """Raises OSError, HTTPException, ValueError."""
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(url, timeout=ROUTER_S) as answer:
            return json.loads(answer.read(MOST_BYTES))
    except HTTPError as error:
        return json.loads(error.read(MOST_BYTES))


def missing_in(ready: dict[str, Any]) -> list[str]:
    """What /ready says is missing. Raises LookupError for what /ready does not say."""
    if "error" in ready:
        return [ready["error"]["message"]]
    return [] if ready["status"] == "ready" else list(ready["missing"])


# -- workers ----------------------------------------------------------------------------------------------------------


async def look_at_worker(
    role: str, address: str, credentials: Credentials | None, without: str = WITHOUT_CERTIFICATES
) -> Worker:
    """`without`: what there is to say to who has no credentials and needs some."""
    seen = Worker(role=role, address=address)
    if credentials is None and not is_local(address):
        return replace(seen, problem=without)
    link = Link(address, role, credentials)
    try:
        async with asyncio.timeout(WORKER_S):
            await status_of(link)  # the connection is made
            asked = clock.now()
            status = await status_of(link)
            answered = clock.now()
    except TimeoutError:
        return replace(seen, problem=await why_silent(address))
    except grpc.aio.AioRpcError as error:
        told = error_of(error)
        silent = isinstance(told, Unavailable)
        problem = await link.why_refused() or await why_silent(address) if silent else str(told)
        return replace(seen, problem=without if problem == WANTS_CERTIFICATES else problem)
    finally:
        await link.close()
    if status.role != role:
        return replace(seen, problem=f"it is a {status.role} worker, not one of {role}")
    return replace(
        seen,
        release=status.version,
        ahead_s=status.clock - (asked + answered) / 2,
        round_trip_s=answered - asked,
        model=status.served_model_name,
        fingerprint=status.fingerprint,
        layout=layout_from_wire(status.layout),
        draining=status.draining,
        without_store=status.without_store,
        certificate_problem=status.certificate_problem,
        expires=await expiry_at(address, role, credentials) if link.secure else None,
    )


async def status_of(link: Link) -> pb.WorkerStatus:
    """Raises AioRpcError."""
    call = link.Watch(pb.WatchRequest())
    try:
        async for status in call:
            return status
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, call.initial_metadata(), await call.trailing_metadata())
    finally:
        call.cancel()


async def why_silent(address: str) -> str:
    """What keeps us from a worker: the network, or the worker."""
    try:
        async with asyncio.timeout(WORKER_S):
            if address.startswith("unix:"):
                _, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
            else:
                host, _, port = address.rpartition(":")
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError as error:
        return reason(error)
    writer.close()
    return "it takes connections, and does not answer"


# -- stores -----------------------------------------------------------------------------------------------------------


async def look_at_socket(socket: Path) -> LocalStore:
    seen = LocalStore(socket=str(socket))
    try:
        link = await StoreLink.open(socket, CALLER, 0)
    except (Unreachable, IncompatibleNode) as error:
        return replace(seen, problem=str(error))
    try:
        stats = (await link.request(say.Stats(link.next_id()), say.Counted, REPLY_S)).stats
    except Unreachable as error:
        return replace(seen, problem=str(error))
    finally:
        await link.close()
    welcome = link.welcome
    return replace(
        seen,
        address=welcome.address,
        sealed=welcome.sealed,
        block_bytes=welcome.block_bytes,
        slots=stats.slots,
        committed=stats.committed,
    )


def visitor(cluster: str, secret: bytes) -> Identity:
    return Identity(cluster, CALLER, os.urandom(16), secret)


async def look_at_store(address: str, me: Identity) -> Store:
    seen = Store(address=address)
    try:
        async with measuring.connection(me, address) as (peer, met):
            await measuring.ask(peer, Probe(0), STORE_S)
            asked = clock.now()
            told, seconds = await measuring.ask(peer, Probe(0), STORE_S)
    except (EOFError, ProtocolError) as error:
        return replace(seen, problem=f"what answers there is no store: {error}")
    except measuring.FAULTS as error:
        return replace(seen, problem=reason(error))
    return replace(
        seen,
        advertised=met.address,
        release=told.release,
        ahead_s=told.clock - asked - seconds / 2,
        round_trip_s=seconds,
        block_bytes=told.block_bytes,
    )


async def look_at_ways(addresses: Sequence[str], me: Identity) -> list[Way]:
    """One after the other, so that none is slowed by another."""
    return [await look_at_way(to, of, me) for to, of in permutations(addresses, 2)]


async def look_at_way(to: str, of: str, me: Identity) -> Way:
    try:
        async with measuring.connection(me, to) as (peer, _):
            told, _ = await measuring.ask(peer, Probe(MAX_PROBE, of), LINK_S)
    except measuring.FAULTS as error:
        return Way(to=to, of=of, problem=f"{to} does not say: {reason(error)}")
    return Way(to=to, of=of, problem=told.problem, round_trip_s=told.round_trip_s, bytes_per_s=told.bytes_per_s)


# -- Redis ------------------------------------------------------------------------------------------------------------


async def look_at_redis(target: RedisTarget) -> Redis:
    seen, anybody = await asyncio.gather(visited(target), is_open(target))
    return replace(seen, open=anybody)


async def visited(target: RedisTarget) -> Redis:
    """Does once what the directory does, with a key of its own, which lapses."""
    seen = Redis(url=str(target))
    pipe = None
    try:
        async with asyncio.timeout(REDIS_S):
            pipe = await redis_pipe.connect(target)
            took = []
            for _ in range(ROUNDS):
                key, asked = f"{KEY_PREFIX}{{{secrets.token_hex(8)}}}:doctor", clock.now()
                for reply in await pipe.run(
                    [["SET", key, "1", "PX", "1000"], ["GET", key], ["PEXPIRE", key, "1000"], ["MGET", key]]
                ):
                    if isinstance(reply, Exception):
                        raise reply
                took.append(clock.now() - asked)
    except ConfigError:
        raise
    except Exception as error:  # of redis-py, of the network or of Redis: `sentence_of` knows them all
        return replace(seen, problem=redis_pipe.sentence_of(error))
    finally:
        if pipe is not None:
            await pipe.close()
    return replace(seen, round_trip_s=median(took))


async def is_open(target: RedisTarget) -> bool:
    """Whether Redis lets in who says no name and no password."""
    pipe = None
    try:
        async with asyncio.timeout(REDIS_S):
            pipe = await redis_pipe.connect(replace(target, user=None, password_file=None))
            if target.kind == "redis+cluster":  # whose nodes were asked for their slots
                return True
            return not any(isinstance(reply, Exception) for reply in await pipe.run([["PING"]]))
    except Exception:  # whatever it is, the visit with a login meets it, too, or it is that a login is wanted
        return False
    finally:
        if pipe is not None:
            await pipe.close()


def today() -> datetime:
    return datetime.now(UTC)
