"""What `kvferry doctor` makes of what it saw: what is wrong, and one sentence on what to do. Asks nobody."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from kvferry.cli.diagnosis import (
    Certificate,
    Finding,
    LocalStore,
    Redis,
    Router,
    Seen,
    Store,
    Way,
    Worker,
    findings,
    in_short,
)
from kvferry.common.block import BlockLayout

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
LAYOUT = BlockLayout(2, 2, 16, 16, "float32")
WELL = {"release": "0.1.0", "round_trip_s": 0.002}
PREFILL = Worker(role="prefill", address="10.0.0.1:7710", model="m", fingerprint=b"f" * 32, layout=LAYOUT, **WELL)
DECODE = replace(PREFILL, role="decode", address="10.0.0.2:7720")
STORES = [Store(address=one, advertised=one, block_bytes=LAYOUT.block_bytes, **WELL)
          for one in ("10.0.0.1:7700", "10.0.0.2:7700")]  # fmt: skip
LOCAL = LocalStore(socket="/run/store", block_bytes=LAYOUT.block_bytes, slots=9, committed=3, address="10.0.0.1:7700")
WAY = Way(to="10.0.0.1:7700", of="10.0.0.2:7700", round_trip_s=0.001, bytes_per_s=1.1e9)
REDIS = Redis(url="redis://10.0.0.1:6379", **WELL)
CERTIFICATE = Certificate(file="/certs/doctor.pem", role="doctor", expires=NOW + timedelta(days=90), state="valid")
ROUTER = Router(url="http://10.0.0.2:8000", release="0.1.0")
GOOD = Seen("0.1.0", NOW, [CERTIFICATE], [PREFILL, DECODE], [LOCAL], STORES, [WAY], [REDIS], [ROUTER])


def bad(**seen) -> list[Finding]:
    """Of a good cluster with this in the place of what it has: what is not ok."""
    return [one for one in findings(replace(GOOD, **seen)) if one.state != "ok"]


def test_a_good_cluster():
    found = findings(GOOD)
    assert {one.state for one in found} == {"ok"}
    assert {one.do for one in found} == {""}
    told = {(one.check, one.of): one.told for one in found}
    assert told == {
        ("certificate", "/certs/doctor.pem"): "valid until 2027-02-19 12:00 UTC",
        ("router", "http://10.0.0.2:8000"): "ready",
        ("worker", "prefill 10.0.0.1:7710"): "m, 2.0 ms away",
        ("clock", "prefill 10.0.0.1:7710"): "+0.000 s against ours, give or take 0.001",
        ("worker", "decode 10.0.0.2:7720"): "m, 2.0 ms away",
        ("clock", "decode 10.0.0.2:7720"): "+0.000 s against ours, give or take 0.001",
        ("model", "prefill 10.0.0.1:7710 and decode 10.0.0.2:7720"): "m, fingerprint 666666666666",
        ("store", "/run/store"): "3 of 9 blocks, others reach it at 10.0.0.1:7700",
        ("store", "10.0.0.1:7700"): "2.0 ms away",
        ("clock", "store 10.0.0.1:7700"): "+0.000 s against ours, give or take 0.001",
        ("store", "10.0.0.2:7700"): "2.0 ms away",
        ("clock", "store 10.0.0.2:7700"): "+0.000 s against ours, give or take 0.001",
        ("link", "10.0.0.2:7700 to 10.0.0.1:7700"): "1,100 MB/s by one connection, 1.0 ms",
        ("redis", "redis://10.0.0.1:6379"): "2.0 ms a round trip",
    }


@pytest.mark.parametrize(
    ("ahead_s", "round_trip_s", "wrong"),
    [(4.9, 0.0, False), (-4.9, 0.0, False), (5.2, 0.0, True), (-5.2, 0.0, True), (5.2, 0.5, False), (86400, 4, True)],
)
def test_a_clock_that_is_wrong_beyond_doubt(ahead_s, round_trip_s, wrong):
    for seen in ({"workers": [replace(DECODE, ahead_s=ahead_s, round_trip_s=round_trip_s)]},
                 {"stores": [replace(STORES[0], ahead_s=ahead_s, round_trip_s=round_trip_s)]}):  # fmt: skip
        found = bad(**seen)
        assert [one.check for one in found] == (["clock"] if wrong else [])
        assert all("set the clocks" in one.do and f"{ahead_s:+.3f} s" in one.told for one in found)


OTHER_LAYOUT = replace(LAYOUT, block_size=32)
WRONG = {
    "dead worker": (
        {"workers": [replace(PREFILL, problem="Connection refused"), DECODE]},
        ("worker", "Connection refused", "start it, or see why this host does not reach 10.0.0.1:7710"),
    ),
    "router": (
        {"routers": [replace(ROUTER, problem="Connection refused")]},
        ("router", "Connection refused", "start it, or see why this host does not reach http://10.0.0.2:8000"),
    ),
    "missing": (
        {"routers": [replace(ROUTER, missing=["no prefill node is ready", "the store is gone"])]},
        ("router", "no prefill node is ready; the store is gone", "start what is missing"),
    ),
    "worker without a store": (
        {"workers": [PREFILL, replace(DECODE, without_store=True)]},
        ("store", "it has no store: no block comes to it or from it", "see in its log why"),
    ),
    "certificate files": (
        {"workers": [PREFILL, replace(DECODE, certificate_problem="D/decode.key cannot be read: Permission denied")]},
        ("certificate", "it goes on with that of before: D/decode.key cannot be read", "copy its files anew"),
    ),
    "role": (
        {"workers": [replace(PREFILL, problem="its certificate is that of decode, not of prefill")]},
        ("worker", "its certificate is that of decode", "give its address as that of its own role"),
    ),
    "other CA": (
        {"workers": [replace(PREFILL, problem="its certificate is not from a CA of our ca.pem")]},
        ("worker", "not from a CA of our ca.pem", "copy ca.pem and its role's certificate and key to its host"),
    ),
    "version": (
        {"workers": [replace(DECODE, release="0.0.9")]},
        ("version", "kvferry 0.0.9, and 0.1.0 here", "install the same version"),
    ),
    "weights": (
        {"workers": [PREFILL, replace(DECODE, fingerprint=b"g" * 32)]},
        ("model", "fingerprint 666666666666 against 676767676767", "the same files of the model"),
    ),
    "dtype": (
        {"workers": [PREFILL, replace(DECODE, layout=replace(LAYOUT, kv_heads=1, head_dim=32))]},
        ("model", "kv_heads 2 against 1, head_dim 16 against 32", "start both with the same model"),
    ),
    "another model": (
        {"workers": [PREFILL, replace(DECODE, model="n")]},
        ("model", "it serves m, and decode n", "start a decode worker for m"),
    ),
    "block bytes": (
        {"stores": [STORES[0], replace(STORES[1], block_bytes=7)]},
        ("blocks", "8192 at store 10.0.0.1:7700, 7 at store 10.0.0.2:7700", "stores of their own"),
    ),
    "local store": (
        {"local": [replace(LOCAL, problem="there is no socket")]},
        ("store", "there is no socket", "start `kvferry store --socket /run/store`"),
    ),
    "store": (
        {"stores": [replace(STORES[0], problem="Connection refused")]},
        ("store", "Connection refused", "start it with --listen, or see why 10.0.0.1:7700 is not reached from here"),
    ),
    "secret": (
        {"stores": [replace(STORES[0], problem="the two stores do not know the same secret (--peer-secret-file)")]},
        ("store", "the same secret", "copy the same store.secret to every host"),
    ),
    "cluster": (
        {"stores": [replace(STORES[0], problem="it is of the cluster 'a', the caller of 'b'")]},
        ("store", "'a', the caller of 'b'", "the same --cluster"),
    ),
    "cut link": (
        {"ways": [replace(WAY, problem="no answer within 1 s")]},
        ("link", "no answer within 1 s", "see why 10.0.0.2:7700 is not reached from 10.0.0.1:7700"),
    ),
    "slow link": (
        {"ways": [replace(WAY, bytes_per_s=12e6)]},
        ("link", "12 MB/s by one connection, 1.0 ms", "find out what slows it: below 50 MB/s"),
    ),
    "redis": (
        {"redis": [replace(REDIS, problem="it did not answer in time")]},
        ("redis", "it did not answer in time", "start it, or it hangs, or correct --redis"),
    ),
    "redis is gone": (
        {"redis": [replace(REDIS, problem="connection: Error 111 connecting to 10.0.0.1:6379.")]},
        ("redis", "Error 111", "start it, or correct --redis, --redis-user and --redis-password-file"),
    ),
    "redis without TLS": (
        {"redis": [replace(REDIS, url="rediss://10.0.0.1:6379", problem="it did not answer in time")]},
        ("redis", "in time", "it does not speak TLS: then write redis: for rediss:"),
    ),
    "redis has another CA": (
        {"redis": [replace(REDIS, url="rediss://10.0.0.1:6379", problem="[SSL: CERTIFICATE_VERIFY_FAILED]")]},
        ("redis", "CERTIFICATE_VERIFY_FAILED", "give --redis-ca-file"),
    ),
    "redis login": (
        {"redis": [replace(REDIS, problem="it does not accept our user and password")]},
        ("redis", "does not accept", "`kvferry store --print-redis-acl` prints: it forgets its ACLs at a restart "
                                     "unless it has an aclfile"),
    ),
    "no store": (
        {"stores": [replace(STORES[0], problem="what answers there is no store: the connection closed")]},
        ("store", "is no store", "give the port at which other stores reach it"),
    ),
    "no router": (
        {"routers": [replace(ROUTER, problem="what answers there is no router of ours")]},
        ("router", "no router", "give the port of a router's API"),
    ),
    "redis rights": (
        {"redis": [replace(REDIS, problem="our user may not do what the directory needs")]},
        ("redis", "our user may not do", "send Redis the line that `kvferry store --print-redis-acl` prints"),
    ),
    "redis is far": (
        {"redis": [replace(REDIS, round_trip_s=0.03)]},
        ("redis", "30.0 ms a round trip", "put it nearer to the stores"),
    ),
    "expired": (
        {"certificates": [replace(CERTIFICATE, state="expired")]},
        ("certificate", "expired", "run `kvferry certs rotate`"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_and_what_to_do(what):
    seen, (check, told, do) = WRONG[what]
    (found,) = bad(**seen)
    assert (found.check, found.state) == (check, "wrong")
    assert told in found.told
    assert do in found.do


@pytest.mark.parametrize(("days", "state"), [(13, "soon"), (15, "ok")])
def test_a_certificate_that_expires_soon(days, state):
    """Its own file's, or one that a worker shows."""
    until = NOW + timedelta(days=days)
    for seen in ({"certificates": [replace(CERTIFICATE, expires=until)]},
                 {"workers": [replace(DECODE, expires=until)]}):  # fmt: skip
        found = bad(**seen)
        assert [one.state for one in found] == (["soon"] if state == "soon" else [])
        assert all("kvferry certs rotate" in one.do for one in found)


def test_a_store_that_sends_others_elsewhere():
    (found,) = bad(stores=[replace(STORES[0], advertised="10.9.9.9:7700")])
    assert (found.state, found.told) == ("soon", "it tells others to come to 10.9.9.9:7700")


def test_a_redis_that_lets_everybody_in():
    (found,) = bad(redis=[replace(REDIS, open=True)])
    assert (found.state, found.told) == ("soon", "its default user is open: who reaches it needs no password")


def test_the_last_line():
    """What will be wrong is counted, though all is well now."""
    soon = [replace(CERTIFICATE, expires=NOW + timedelta(days=days)) for days in (3, 5)]
    gone = replace(ROUTER, problem="Connection refused")
    assert in_short(findings(GOOD)) == "all is well: 14 checks"
    assert in_short(findings(replace(GOOD, certificates=soon[:1]))) == "all is well; 1 certificate ends soon"
    open_redis = replace(GOOD, certificates=soon, redis=[replace(REDIS, open=True)])
    assert in_short(findings(open_redis)) == "all is well; 2 certificates end soon; 1 warning"
    assert in_short(findings(replace(GOOD, certificates=soon[:1], routers=[gone]))) == (
        "1 of 14 checks found something wrong; 1 certificate ends soon"
    )


def test_several_models_side_by_side_are_fine():
    others = [replace(one, model="n", fingerprint=b"g" * 32) for one in (PREFILL, DECODE)]
    assert bad(workers=[PREFILL, DECODE, *others]) == []


def test_what_a_problem_says_itself_is_not_said_twice():
    (found,) = bad(workers=[replace(DECODE, problem="it wants certificates; start this one with --certs, too")])
    assert found.do == ""
