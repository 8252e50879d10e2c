"""Clusters for the tests of this folder. A start costs some twenty seconds of CPU time, nearly all of it imports, so
what can be shared is: one a session and architecture that nobody harms, two to hurt and to heal. The others are own."""

import re
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from checkpoints import ARCHITECTURES, tiny_checkpoint
from e2e.cluster import KVFERRY, Cluster, Prompts
from e2e.probe import Probe
from oracle import Oracle

TENANTS = ("acme", "beta", "a", "ab")
TENANTS_FILE = "tenants.toml"
SLOW_PUBLISHING = "--prefill-arg=--failpoint=publish.copied=sleep:0.3"  # so a long prompt can be met half filled
HURT = {  # Llama's too. Whoever kills or stops a process of these waits until all is as it was.
    "slow": (SLOW_PUBLISHING,),
    "pairs": (SLOW_PUBLISHING, "--prefill=2", "--decode=2", "--lease-seconds=0.5", "--log-level=DEBUG"),
}
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


class Shared:
    """The session's clusters, each started when it is first asked for. They have tenants."""

    def __init__(self, start: Callable[[str], Cluster]):
        self._start = start
        self._current: dict[str, Cluster] = {}
        self._all: list[Cluster] = []

    def __call__(self, name: str) -> Cluster:
        """That of an architecture, which nobody harms, or one of HURT."""
        if name not in self._current:
            self._current[name] = self._start(name)
            self._all.append(self._current[name])
        return self._current[name]

    def last_of(self, name: str) -> Cluster:
        """To be ended by its test. Who asks for the name from here on is given another one."""
        cluster = self(name)
        del self._current[name]
        return cluster

    def stop(self) -> None:
        for cluster in self._all:
            if cluster.process.poll() is None:
                cluster.stop()


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, checkpoints: dict[str, Path], folder: Path, keys: dict) -> Iterator[Shared]:
    starts = count()

    def start(name: str) -> Cluster:
        flags = (f"--tenants-file={folder / TENANTS_FILE}", *HURT.get(name, ()))
        log = folder / f"{name}-{next(starts)}.log"
        cluster = track(request, Cluster(checkpoints["llama" if name in HURT else name], log, *flags))
        cluster.key = keys[TENANTS[0]]
        return cluster.start()

    clusters = Shared(start)
    yield clusters
    clusters.stop()


@pytest.fixture
def last_of(shared: Shared) -> Callable[[str], Cluster]:
    """`last_of(name)`: a shared cluster, to be ended. Tests that take this one run after all others of the folder."""
    return shared.last_of


@pytest.fixture
def slow(shared: Shared) -> Cluster:
    return shared("slow")


@pytest.fixture
def pairs(shared: Shared) -> Cluster:
    return shared("pairs")


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What ends a shared cluster comes last of this folder."""
    here = [at for at, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    in_order = sorted((items[at] for at in here), key=lambda item: "last_of" in item.fixturenames)
    for at, item in zip(here, in_order, strict=True):
        items[at] = item


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A failure shows the end of the log of each cluster that runs."""
    report = yield
    if report.failed:
        for cluster in item.config.stash.get(LIVE, []):
            if getattr(cluster, "process", None) and (cluster.process.poll() is None or call.when != "call"):
                report.sections.append((f"log of {' '.join(cluster.process.args[1:])}", cluster.tail()))
    return report
