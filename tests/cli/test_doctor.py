"""`kvferry doctor` against real processes on two hosts: all is well, and one thing after the other that is not."""

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from command_line import KVFERRY, kvferry
from e2e.cluster import until
from e2e.netns import network
from e2e.two_hosts import PREFILL, TwoHosts
from trust_folder import Folder

ODD = PREFILL + 1  # the port of a prefill worker with other weights under the same name


class Doctor:
    """Looks from the test's own host, with what `kvferry certs init` made."""

    def __init__(self, cluster: TwoHosts, folder: Path, odd: Path):
        self.cluster, self.made, self.odd = cluster, folder / "made", odd
        self.a, self.b = cluster.a.address, cluster.b.address
        self.workers = [f"--prefill={cluster.at('prefill')}", f"--decode={cluster.at('decode')}"]
        self.certs = [f"--certs={self.made}"]
        self.stores = [f"--peer={cluster.at('store a')}", f"--peer={cluster.at('store b')}"]
        self.secret = [f"--peer-secret-file={self.made}/store.secret"]
        self.redis = [f"--redis=redis://{self.a}:6379", "--redis-user=kvferry",
                      f"--redis-password-file={self.made}/redis.password"]  # fmt: skip

    def look(self, *flags: str) -> tuple[int, list[dict[str, Any]]]:
        """The exit code, and what it found."""
        done = kvferry("doctor", *flags, "--json")
        assert done.returncode in (0, 1), done.stderr
        assert done.stderr == ""
        told = json.loads(done.stdout)
        assert told["ok"] == (done.returncode == 0)
        return done.returncode, told["findings"]

    def wrong(self, *flags: str) -> list[tuple[str, str, str, str]]:
        """What is wrong: check, of, told, do."""
        code, found = self.look(*flags)
        wrong = [tuple(one[key] for key in ("check", "of", "told", "do")) for one in found if one["state"] == "wrong"]
        assert bool(wrong) == (code == 1)
        return wrong


@pytest.fixture(scope="module")
def doctor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doctor]:
    folder = tmp_path_factory.mktemp("doctor")
    model, other = (tiny_checkpoint(folder / name, "llama", seed, True) for seed, name in enumerate(("llama", "odd")))
    tenants_file = folder / "tenants.toml"
    subprocess.run([KVFERRY, "keys", "create", "acme", f"--tenants-file={tenants_file}"], check=True)
    with network("a", "b") as net:
        cluster = TwoHosts(net, model, folder, tenants_file, relayed=False)
        try:
            yield Doctor(cluster.start(), folder, other)
            cluster.stop()
        finally:
            print(cluster.tail(1500))
            cluster.kill()


@pytest.fixture(scope="module")
def odd(doctor) -> Iterator[str]:
    """The address of a worker with other weights."""
    cluster = doctor.cluster
    address = f"{doctor.a}:{ODD}"
    command = [word.replace(str(cluster.model), str(doctor.odd)) for word in cluster.command("prefill")]
    command = [word.replace(f":{PREFILL}", f":{ODD}") for word in command] + ["--served-model-name=llama"]
    with open(cluster.folder_of(cluster.a) / "odd.log", "wb") as log:
        process = cluster.a.popen(command, log)
    try:
        until(lambda: "node serves" in (cluster.folder_of(cluster.a) / "odd.log").read_text(), 120, "worker there")
        yield address
    finally:
        process.kill()
        process.wait()


def test_a_good_cluster(doctor):
    code, found = doctor.look(
        f"--router={doctor.cluster.url}",
        *doctor.workers, *doctor.certs, *doctor.stores, *doctor.secret, *doctor.redis,
        f"--store={doctor.cluster.folder_of(doctor.cluster.b)}/store",
    )  # fmt: skip
    assert [one["check"] for one in found if one["state"] != "ok"] == ["redis"], found
    assert [one["told"] for one in found if one["state"] == "soon"] == [
        "its default user is open: who reaches it needs no password"]  # fmt: skip
    assert code == 0
    assert Counter(one["check"] for one in found) == {
        "router": 1, "certificate": 7, "worker": 2, "clock": 4, "model": 1, "store": 3, "link": 2, "redis": 2
    }  # fmt: skip
    for link in (one for one in found if one["check"] == "link"):
        assert "MB/s by one connection" in link["told"]


def test_what_a_person_sees(doctor):
    told = kvferry("doctor", *doctor.workers, *doctor.certs)
    assert told.returncode == 0
    lines = told.stdout.splitlines()
    assert lines[-1] == "all is well: 12 checks"
    assert any(line.split()[:2] == ["worker", "prefill"] for line in lines)
    assert max(map(len, lines)) <= 200


def test_a_configuration_file(doctor, tmp_path):
    """The same that the processes have."""
    file = tmp_path / "kvferry.toml"
    made, cluster = doctor.made, doctor.cluster
    file.write_text(f"""
[router]
prefill = ["{cluster.at("prefill")}"]
decode = ["{cluster.at("decode")}"]
certs = "{made}"
[store]
socket = "{cluster.folder_of(cluster.a)}/store"
redis = "redis://{doctor.a}:6379"
redis_user = "kvferry"
redis_password_file = "{made}/redis.password"
peer_secret_file = "{made}/store.secret"
""")
    code, found = doctor.look(f"--config={file}")
    assert code == 0, found
    assert {"worker", "model", "redis"} <= {one["check"] for one in found}
    assert [one["of"] for one in found if one["check"] == "store"] == [
        f"{cluster.folder_of(cluster.a)}/store", cluster.at("store a")]  # fmt: skip


@pytest.mark.long
def test_a_router_that_misses_somebody(doctor):
    (gone,) = doctor.wrong("--router=http://127.0.0.1:1")
    assert gone[:3] == ("router", "http://127.0.0.1:1", "Connection refused")
    (stranger,) = doctor.wrong(f"--router=http://{doctor.cluster.front.address}:8001/nodes")
    assert stranger[2:] == ("what answers there is no router of ours", "give the port of a router's API")
    (admin,) = doctor.wrong(f"--router=http://{doctor.cluster.front.address}:8001")
    assert admin[2:] == ("that is its admin port; give that of its API", "")
    doctor.cluster.kill_one("store b")
    try:
        url = doctor.cluster.url
        (missing,) = until(lambda: doctor.wrong(f"--router={url}"), 10, "told")
    finally:
        doctor.cluster.run_store_again("b")
    assert missing[:2] == ("router", url)
    assert "the store node does not answer" in missing[2]
    assert doctor.wrong(f"--router={url}") == []


def test_a_wrong_secret(doctor, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("not the one that the stores have")
    secret.chmod(0o600)
    wrong = doctor.wrong(*doctor.stores, f"--peer-secret-file={secret}")
    assert [one[:2] for one in wrong] == [("store", doctor.cluster.at(f"store {name}")) for name in "ab"]
    assert all("do not know the same secret" in told for _, _, told, _ in wrong)
    assert all("copy the same store.secret to every host" in do for *_, do in wrong)


def test_a_store_asked_at_a_workers_port(doctor):
    at = doctor.cluster.at("prefill")
    (wrong,) = doctor.wrong(f"--peer={at}", *doctor.secret)
    assert wrong[:2] == ("store", at)
    assert wrong[2].startswith("what answers there is no store: ")
    assert wrong[3].startswith("give the port at which other stores reach it")


def test_certificates_of_ours_that_cannot_be_used(doctor, tmp_path):
    """It says so, and not that none were given."""
    mine = Folder(tmp_path / "mine", "doctor").fill()
    (mine.path / "doctor.key").unlink()
    file, *workers = doctor.wrong(*doctor.workers, f"--certs={mine.path}")
    assert (file[0], file[2].startswith("there is no ")) == ("certificate", True)
    assert [one[2:] for one in workers] == [
        (f"of {mine.path} nothing can be shown to it; mend what is said of its files", "")] * 2  # fmt: skip


def test_another_cluster(doctor):
    (one, _) = doctor.wrong(*doctor.stores, *doctor.secret, "--cluster=elsewhere")
    assert "'elsewhere'" in one[2]
    assert "'kvferry'" in one[2]
    assert one[3] == "start every store, and this, with the same --cluster"


def test_a_worker_that_is_not_there(doctor):
    gone = f"{doctor.a}:{PREFILL + 9}"
    wrong = doctor.wrong(*doctor.workers, *doctor.certs, f"--prefill={gone}")
    assert wrong == [("worker", f"prefill {gone}", "Connection refused",
                      f"start it, or see why this host does not reach {gone}")]  # fmt: skip


@pytest.mark.long
def test_a_worker_that_hangs(doctor):
    with doctor.cluster.stopped("decode"):
        (wrong,) = doctor.wrong(*doctor.workers, *doctor.certs)
    assert wrong[:3] == ("worker", f"decode {doctor.cluster.at('decode')}", "it takes connections, and does not answer")
    assert wrong[3] == "look into its log, and start it anew"


def test_a_worker_of_another_role(doctor):
    at = doctor.cluster.at("prefill")
    (wrong,) = doctor.wrong(f"--decode={at}", *doctor.certs)
    assert wrong[:3] == ("worker", f"decode {at}", "its certificate is that of prefill, not of decode")
    assert "give its address as that of its own role" in wrong[3]


def test_a_worker_whose_certificate_files_cannot_be_used(doctor):
    """It goes on, and says so: to the doctor, and on the router's page of nodes."""
    cluster = doctor.cluster
    key = cluster.certs_of(cluster.a) / "prefill.key"
    away = key.with_name("prefill.key.away")
    key.rename(away)
    try:
        (wrong,) = until(lambda: doctor.wrong(*doctor.workers, *doctor.certs), 20, "told")
        assert wrong[:2] == ("certificate", f"prefill {cluster.at('prefill')}")
        assert wrong[2].startswith(f"it goes on with that of before: there is no {key}; ")

        def problems() -> dict[str, str]:
            return {node["role"]: node["certificate_problem"] for node in cluster.nodes()["nodes"]}

        until(lambda: problems()["prefill"].startswith(f"there is no {key}; "), 20, "told to the router")
        assert problems()["decode"] == ""
    finally:
        away.rename(key)
    until(lambda: doctor.wrong(*doctor.workers, *doctor.certs) == [], 20, "mended")


def test_other_weights_under_the_same_name(doctor, odd):
    (wrong,) = doctor.wrong(*doctor.workers, *doctor.certs, f"--prefill={odd}")
    assert wrong[:2] == ("model", f"prefill {odd} and decode {doctor.cluster.at('decode')}")
    assert wrong[2].startswith("fingerprint ")
    assert "the same files of the model" in wrong[3]


@pytest.mark.long
def test_certificates_of_another_ca_and_old_ones(doctor, tmp_path):
    stranger = Folder(tmp_path / "stranger", "doctor").fill()
    wrong = doctor.wrong(*doctor.workers, f"--certs={stranger.path}")
    assert [one[0] for one in wrong] == ["worker", "worker"]
    assert all(told == "its certificate is not from a CA of our ca.pem" for _, _, told, _ in wrong)
    assert all("copy ca.pem" in do for *_, do in wrong)
    stranger.put(stranger.issue(days=5))
    code, found = doctor.look(f"--certs={stranger.path}")
    assert (code, [one["state"] for one in found]) == (0, ["ok", "soon"])
    stranger.put(stranger.issue(days=5, ago=10))
    (expired,) = doctor.wrong(f"--certs={stranger.path}")
    assert (expired[0], expired[2], "kvferry certs rotate" in expired[3]) == ("certificate", "expired", True)


@pytest.mark.long
def test_redis_that_refuses_and_redis_that_is_gone(doctor, tmp_path):
    password = tmp_path / "password"
    password.write_text("another\n")
    (refused,) = doctor.wrong(*doctor.redis[:2], f"--redis-password-file={password}")
    assert refused[:3] == ("redis", f"redis://{doctor.a}:6379", "it does not accept our user and password")
    assert "--print-redis-acl" in refused[3]
    (plain,) = doctor.wrong(f"--redis=rediss://{doctor.a}:6379", *doctor.redis[1:])
    assert "it does not speak TLS" in plain[3]
    with doctor.cluster.redis() as client:
        client.config_set("requirepass", "a password of its default user")
        try:
            code, found = doctor.look(*doctor.redis)
        finally:
            client.config_set("requirepass", "")
    assert (code, [one["state"] for one in found]) == (0, ["ok"]), "nobody else is let in"
    with doctor.cluster.redis() as client:
        client.execute_command("ACL", "SETUSER", "kvferry", "-set")
    try:
        (forbidden,) = doctor.wrong(*doctor.redis)
    finally:
        doctor.cluster.admit_to_redis()
    assert "--print-redis-acl" in forbidden[3]
    with doctor.cluster.stopped("redis"):
        (silent,) = doctor.wrong(*doctor.redis)
    assert silent[2] == "it did not answer in time"
    assert doctor.wrong(*doctor.redis) == []


@pytest.mark.long
def test_a_slow_link_and_a_cut_one(doctor):
    net = doctor.cluster.net
    if not net.can_cut:
        pytest.skip("no namespaces can be made here, so there is no cable to slow")
    from_a, from_b = (f"{doctor.cluster.at(f'store {one}')} to {doctor.cluster.at(f'store {other}')}"
                      for one, other in ("ab", "ba"))  # fmt: skip
    try:
        net.slow(net.hosts["a"], 80)
        (slow,) = doctor.wrong(*doctor.stores, *doctor.secret)
        assert slow[:2] == ("link", from_a)
        assert 5 < float(slow[2].split()[0]) < 20, "80 Mbit/s are 10 MB/s"
        net.heal()
        net.cut(net.hosts["a"], net.hosts["b"])
        cut = doctor.wrong(*doctor.stores, *doctor.secret)
        assert {one[1] for one in cut} == {from_a, from_b}
        assert {one[2] for one in cut} == {"no answer within 1 s"}
    finally:
        net.heal()


def test_what_it_cannot_look_at_is_told_in_one_line():
    for flags, told in (
        ((), "there is nothing to look at; give --router, --prefill, --decode, --store, --peer, --redis or --certs"),
        (("--peer=10.0.0.1:7700",), "a store speaks to nobody who does not know its secret; give --peer-secret-file"),
        (("--peer=10.0.0.1", "--peer-secret-file=/nothing"), "--peer '10.0.0.1' is not HOST:PORT, such as "
                                                             "10.0.0.1:7700"),
        (("--router=10.0.0.1:8000",), "'10.0.0.1:8000' is not where a router is; write it like http://10.0.0.1:8000"),
        (("--prefill=nowhere",), "'nowhere' is not a worker address; write unix:/path or 127.0.0.1:PORT"),
    ):  # fmt: skip
        refused = kvferry("doctor", *flags)
        assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", f"kvferry doctor: {told}\n")
