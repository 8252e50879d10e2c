"""Clusters for the tests of this folder: one a session and architecture that nobody harms, and own ones to kill."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import ARCHITECTURES, tiny_checkpoint
from e2e.cluster import KVFERRY, Cluster, Prompts
from e2e.probe import Probe
from oracle import Oracle

TENANTS = ("acme", "beta", "a", "ab")
TENANTS_FILE = "tenants.toml"
LIVE: pytest.StashKey[list[Cluster]] = pytest.StashKey()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("e2e")


@pytest.fixture(scope="session")
def checkpoints(folder: Path) -> dict[str, Path]:
    return {arch: tiny_checkpoint(folder / arch, arch, printable=True) for arch in ARCHITECTURES}


@pytest.fixture(scope="session")
def keys(folder: Path) -> dict[str, str]:
    """An API key for each tenant, as `kvferry keys create` gives it."""
    create = [*KVFERRY, "keys", "create", f"--tenants-file={folder / TENANTS_FILE}"]
    return {name: subprocess.check_output([*create, name], text=True).strip() for name in TENANTS}


@pytest.fixture(scope="session")
def oracles(checkpoints: dict[str, Path]) -> dict[str, Oracle]:
    return {arch: Oracle(path) for arch, path in checkpoints.items()}


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, checkpoints: dict[str, Path], folder: Path, keys: dict) -> Iterator:
    """`shared(arch)`: the session's cluster of an architecture, started when first asked for. It has tenants."""
    started: dict[str, Cluster] = {}

    def get(arch: str) -> Cluster:
        if arch not in started:
            flag = f"--tenants-file={folder / TENANTS_FILE}"
            cluster = track(request, Cluster(checkpoints[arch], folder / f"{arch}.log", flag))
            cluster.key = keys[TENANTS[0]]
            started[arch] = cluster.start()
        return started[arch]

    yield get
    for cluster in started.values():
        cluster.stop()


@pytest.fixture
def llama(shared) -> Cluster:
    return shared("llama")


@pytest.fixture
def oracle(oracles: dict[str, Oracle]) -> Oracle:
    """Llama's."""
    return oracles["llama"]


@pytest.fixture(scope="module")
def own(request: pytest.FixtureRequest, checkpoints: dict[str, Path], folder: Path, keys: dict) -> Iterator:
    """`own(*flags)`: a cluster of this module alone, stopped, and checked to be gone, with it."""
    started: list[Cluster] = []

    def start(*flags: str, arch: str = "llama", tenants: bool = True, **more) -> Cluster:
        log = folder / f"{request.module.__name__.rpartition('.')[2]}-{len(started)}.log"
        if tenants:
            flags = (f"--tenants-file={folder / TENANTS_FILE}", *flags)
        cluster = track(request, Cluster(checkpoints[arch], log, *flags, **more))
        cluster.key = keys[TENANTS[0]] if tenants else ""
        started.append(cluster.start())
        return cluster

    yield start
    for cluster in started:
        if cluster.process.poll() is None:
            cluster.stop()


@pytest.fixture
def probe_of(folder: Path):
    return lambda cluster: Probe(cluster, folder / TENANTS_FILE)


@pytest.fixture
def prompts(request: pytest.FixtureRequest) -> Prompts:
    return Prompts(re.sub(r"\W+", "-", request.node.name))


def track(request: pytest.FixtureRequest, cluster: Cluster) -> Cluster:
    request.config.stash.setdefault(LIVE, []).append(cluster)
    return cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A failure shows the end of the log of each cluster that runs."""
    report = yield
    if report.failed:
        for cluster in item.config.stash.get(LIVE, []):
            if getattr(cluster, "process", None) and (cluster.process.poll() is None or call.when != "call"):
                report.sections.append((f"log of {' '.join(cluster.process.args[1:])}", cluster.tail()))
    return report
