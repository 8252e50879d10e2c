"""What is wrong with a cluster, by what was seen of its parts. Asks nobody: `cli/examination.py` does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product

from kvferry.common.block import BlockLayout
from kvferry.common.credentials import WARN, minute
from kvferry.common.values import counted

CLOCK_S = 5.0  # so far apart clocks may be, beside what the round trip leaves open
REDIS_S = 0.025  # a look-up takes two round trips at most, and is given up after 50 ms
LEAST_BYTES_PER_S = 50e6  # who sends more slowly is not waited for

SET_CLOCKS = "set the clocks, for example with chrony: certificates and API keys expire by them"
ROTATE = "run `kvferry certs rotate` where the CA is, and copy the new files to their hosts"
SAME_RELEASE = "install the same version of kvferry on every host"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a process says of itself. `problem`: why it cannot be spoken to, or not as it should be; then the rest is
    not known. `ahead_s`: its clock before ours, give or take half of `round_trip_s`."""

    problem: str = ""
    release: str = ""
    ahead_s: float = 0.0
    round_trip_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker(Answer):
    role: str
    address: str
    model: str = ""
    fingerprint: bytes = b""
    layout: BlockLayout | None = None
    draining: bool = False
    without_store: bool = False
    certificate_problem: str = ""  # of the files that lie there; it shows that of before
    expires: datetime | None = None  # its certificate

    @property
    def who(self) -> str:
        return f"{self.role} {self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Router(Answer):
    """`missing`: what it was told of and has not."""

    url: str
    missing: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Store(Answer):
    """One that was asked over TCP. `advertised`: by which address others are told to reach it."""

    address: str
    advertised: str = ""
    block_bytes: int = 0  # before its first worker


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStore(Answer):
    """This host's, by its socket. `address`: by which others reach it, if they can."""

    socket: str
    address: str = ""
    block_bytes: int = 0
    sealed: bool = False
    slots: int = 0
    committed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """The link by which the store at `to` fetches from that at `of`."""

    to: str
    of: str
    problem: str = ""
    round_trip_s: float = 0.0
    bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Redis(Answer):
    """`open`: its default user needs no password."""

    url: str
    open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A file of `--certs`. `state`: valid, or why it cannot be used."""

    file: str
    role: str
    expires: datetime
    state: str


@dataclass(frozen=True, slots=True)
class Seen:
    """All that was looked at. `release`: our own."""

    release: str
    now: datetime
    certificates: Sequence[Certificate] = ()
    workers: Sequence[Worker] = ()
    local: Sequence[LocalStore] = ()
    stores: Sequence[Store] = ()
    ways: Sequence[Way] = ()
    redis: Sequence[Redis] = ()
    routers: Sequence[Router] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """`state`: ok, soon (it will be wrong) or wrong. `told`: what was seen. `do`: one sentence, where there is
    something to do."""

    check: str
    of: str
    state: str
    told: str
    do: str = field(default="")


def findings(seen: Seen) -> list[Finding]:
    """One for everything that was looked at, in order, and for what does not fit together."""
    return [
        *(of_certificate(one, seen.now) for one in seen.certificates),
        *(finding for one in seen.routers for finding in of_router(one, seen)),
        *(finding for one in seen.workers for finding in of_worker(one, seen)),
        *between_workers(seen.workers),
        *(of_local(one) for one in seen.local),
        *(finding for one in seen.stores for finding in of_store(one, seen)),
        *between_stores(seen),
        *(of_way(one) for one in seen.ways),
        *(finding for one in seen.redis for finding in of_redis(one)),
    ]


def in_short(found: Sequence[Finding]) -> str:
    """The last line of the table."""
    wrong, soon = (sum(one.state == state for one in found) for state in ("wrong", "soon"))
    told = [f"{wrong} of {len(found)} checks found something wrong"] if wrong else ["all is well"]
    if ends := sum(one.state == "soon" and one.check == "certificate" for one in found):
        told.append(f"{counted(ends, 'certificate')} {'ends' if ends == 1 else 'end'} soon")
    if soon > ends:
        told.append(f"{counted(soon - ends, 'warning')}")
    return "; ".join(told) if wrong or soon else f"all is well: {len(found)} checks"


def of_certificate(one: Certificate, now: datetime) -> Finding:
    told = f"valid until {minute(one.expires)}" if one.state == "valid" else one.state
    if one.state != "valid":
        return Finding("certificate", one.file, "wrong", told, "" if ";" in told else ROTATE)
    soon = one.expires - now < WARN
    return Finding("certificate", one.file, "soon" if soon else "ok", told, ROTATE if soon else "")


def of_worker(one: Worker, seen: Seen) -> Iterator[Finding]:
    if one.problem:
        yield Finding("worker", one.who, "wrong", one.problem, advice_on_worker(one))
        return
    told = f"{one.model}, {milliseconds(one.round_trip_s)} away" + (", draining" if one.draining else "")
    yield Finding("worker", one.who, "ok", told)
    if one.without_store:
        yield Finding("store", one.who, "wrong", "it has no store: no block comes to it or from it",
                      "see in its log why, and that --store of the worker is --socket of its host's store")  # fmt: skip
    if why := one.certificate_problem:
        yield Finding("certificate", one.who, "wrong", f"it goes on with that of before: {why}",
                      "" if ";" in why else "copy its files anew from the folder of `kvferry certs init`")  # fmt: skip
    yield from of_answer(one.who, one, seen)
    if one.expires is not None:
        yield of_certificate(
            Certificate(file=one.who, role=one.role, expires=one.expires, state="valid"), seen.now
        )  # fmt: skip


def advice_on_worker(one: Worker) -> str:
    """Empty where the problem says it itself."""
    if ";" in one.problem:
        return ""
    if f"not of {one.role}" in one.problem or f"not one of {one.role}" in one.problem:
        return f"give its address as that of its own role, or let a {one.role} worker with its certificate listen there"
    if "not from a CA" in one.problem:
        return "copy ca.pem and its role's certificate and key to its host from the folder of `kvferry certs init`"
    if "does not answer" in one.problem:
        return "look into its log, and start it anew"
    return f"start it, or see why this host does not reach {one.address}"


def of_router(one: Router, seen: Seen) -> Iterator[Finding]:
    if one.problem:
        do = "" if ";" in one.problem else f"start it, or see why this host does not reach {one.url}"
        if "is no router" in one.problem:
            do = "give the port of a router's API"
        yield Finding("router", one.url, "wrong", one.problem, do)
        return
    do = "start what is missing, or see why the router's host does not reach it" if one.missing else ""
    yield Finding("router", one.url, "wrong" if one.missing else "ok", "; ".join(one.missing) or "ready", do)
    yield from of_release(one.url, one, seen)


def of_answer(who: str, one: Answer, seen: Seen) -> Iterator[Finding]:
    """The clock and version of a process that answers."""
    apart = max(0.0, abs(one.ahead_s) - one.round_trip_s / 2)
    told = f"{one.ahead_s:+.3f} s against ours, give or take {one.round_trip_s / 2:.3f}"
    late = apart > CLOCK_S
    yield Finding("clock", who, "wrong" if late else "ok", told, SET_CLOCKS if late else "")
    yield from of_release(who, one, seen)


def of_release(who: str, one: Answer, seen: Seen) -> Iterator[Finding]:
    if one.release != seen.release:
        told = f"kvferry {one.release or 'of another time'}, and {seen.release} here"
        yield Finding("version", who, "wrong", told, SAME_RELEASE)


def between_workers(workers: Sequence[Worker]) -> Iterator[Finding]:
    """Whether the KV of each prefill worker is of use to the decode workers that have the same model."""
    there = [one for one in workers if not one.problem]
    prefill, decode = ([one for one in there if one.role == role] for role in ("prefill", "decode"))
    for one in prefill:
        if decode and not any(other.model == one.model for other in decode):
            names = ", ".join(sorted({other.model for other in decode}))
            yield Finding("model", one.who, "wrong", f"it serves {one.model}, and decode {names}",
                          f"start a decode worker for {one.model}, or {one.who} with that model")  # fmt: skip
    for one, other in product(prefill, decode):
        if one.model != other.model:
            continue
        pair = f"{one.who} and {other.who}"
        if layouts := one.layout.differences(other.layout):
            yield Finding("model", pair, "wrong", f"their blocks differ: {layouts}",
                          "start both with the same model, --dtype and --block-size")  # fmt: skip
        elif one.fingerprint != other.fingerprint:
            told = f"fingerprint {one.fingerprint.hex()[:12]} against {other.fingerprint.hex()[:12]}"
            yield Finding("model", pair, "wrong", told,
                          "give both the same files of the model and the same --dtype: weights or configuration differ",
                          )  # fmt: skip
        else:
            yield Finding("model", pair, "ok", f"{one.model}, fingerprint {one.fingerprint.hex()[:12]}")


def of_local(one: LocalStore) -> Finding:
    if one.problem:
        return Finding("store", one.socket, "wrong", one.problem, f"start `kvferry store --socket {one.socket}`")
    used = f"{one.committed} of {counted(one.slots, 'block')}" if one.slots else "no worker has come yet"
    reach = f"others reach it at {one.address}" if one.address else "this host's alone"
    return Finding("store", one.socket, "ok", f"{used}, {reach}" + (", sealed" if one.sealed else ""))


def of_store(one: Store, seen: Seen) -> Iterator[Finding]:
    who = f"store {one.address}"
    if one.problem:
        yield Finding("store", one.address, "wrong", one.problem, advice_on_meeting(one.problem, one.address))
        return
    yield Finding("store", one.address, "ok", f"{milliseconds(one.round_trip_s)} away")
    if one.advertised != one.address:
        told = f"it tells others to come to {one.advertised}"
        yield Finding("store", one.address, "soon", told,
                      "see that every host reaches it there, or start it with another --advertise")  # fmt: skip
    yield from of_answer(who, one, seen)


def advice_on_meeting(problem: str, address: str) -> str:
    if "is no store" in problem:
        return "give the port at which other stores reach it, that of its --listen or --advertise"
    if "secret" in problem:
        return "copy the same store.secret to every host, and start the stores with it as --peer-secret-file"
    if "of the cluster" in problem:
        return "start every store, and this, with the same --cluster"
    if "protocol version" in problem:
        return SAME_RELEASE
    return f"start it with --listen, or see why {address} is not reached from here"


def between_stores(seen: Seen) -> Iterator[Finding]:
    """Blocks of one size travel between stores of a cluster, and are the workers'."""
    sizes = {f"store {one.address}": one.block_bytes for one in seen.stores}
    sizes |= {f"store {one.socket}": one.block_bytes for one in seen.local}
    sizes |= {one.who: one.layout.block_bytes for one in seen.workers if one.layout is not None}
    told = {who: size for who, size in sizes.items() if size}
    if len(set(told.values())) > 1:
        words = ", ".join(f"{size} at {who}" for who, size in told.items())
        yield Finding("blocks", "all", "wrong", f"their bytes differ: {words}",
                      "for each model, dtype and block size use stores of their own, with another --cluster",
                      )  # fmt: skip


def of_way(one: Way) -> Finding:
    who = f"{one.of} to {one.to}"
    if one.problem:
        return Finding("link", who, "wrong", one.problem, advice_on_meeting(one.problem, one.of)
                       .replace("from here", f"from {one.to}"))  # fmt: skip
    told = f"{one.bytes_per_s / 1e6:,.0f} MB/s by one connection, {milliseconds(one.round_trip_s)}"
    if one.bytes_per_s < LEAST_BYTES_PER_S:
        return Finding("link", who, "wrong", told, f"find out what slows it: below {LEAST_BYTES_PER_S / 1e6:.0f} MB/s "
                       "prompts are computed again rather than waited for")  # fmt: skip
    return Finding("link", who, "ok", told)


def of_redis(one: Redis) -> Iterator[Finding]:
    told = f"{milliseconds(one.round_trip_s)} a round trip"
    if one.problem:
        yield Finding("redis", one.url, "wrong", one.problem, advice_on_redis(one))
    elif one.round_trip_s > REDIS_S:
        yield Finding("redis", one.url, "wrong", told, "put it nearer to the stores: what takes longer than 50 ms is "
                      "given up, and counts as a miss")  # fmt: skip
    else:
        yield Finding("redis", one.url, "ok", told)
    if one.open:
        yield Finding("redis", one.url, "soon", "its default user is open: who reaches it needs no password",
                      "switch that user off or give it a password, in Redis' configuration or aclfile")  # fmt: skip


def advice_on_redis(one: Redis) -> str:
    if "may not do" in one.problem:
        return "send Redis the line that `kvferry store --print-redis-acl` prints"
    if "does not accept" in one.problem:
        return ("correct --redis-user and --redis-password-file, or send Redis the line that `kvferry store "
                "--print-redis-acl` prints: it forgets its ACLs at a restart unless it has an aclfile")  # fmt: skip
    if "CERTIFICATE_VERIFY" in one.problem:
        return "give --redis-ca-file with the CA of its certificate, and the name that the certificate has in --redis"
    if one.url.startswith("rediss") and "Error 111" not in one.problem:  # not that nobody listens
        return "start it, or it hangs, or it does not speak TLS: then write redis: for rediss: in --redis"
    if "in time" in one.problem:
        return "start it, or it hangs, or correct --redis"
    return "start it, or correct --redis, --redis-user and --redis-password-file"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
