"""Configuration is checked when it is made, and refuses in one sentence."""

import dataclasses
from pathlib import Path

import pytest

from kvferry.common import config
from kvferry.common.config import (
    EngineConfig,
    RouterConfig,
    StoreConfig,
    WorkerConfig,
    cache_dir,
    check_worker_address,
    is_loopback,
)
from kvferry.common.errors import ConfigError

SOCKET = Path("/tmp/s")
ROUTER = RouterConfig(model="m", prefill=(), decode=("unix:/tmp/d",), store=SOCKET)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.com", "localhost.a.com", "127.0.0.1x"])
def test_not_loopback(host):
    assert not is_loopback(host)


@pytest.mark.parametrize("address", ["unix:/run/w", "127.0.0.1:9000", "localhost:1", "[::1]:9000"])
def test_worker_addresses(address):
    assert check_worker_address(address, None) == address


@pytest.mark.parametrize("address", ["0.0.0.0:9000", "[::]:9000", "10.0.0.1:9000", "worker.local:9000"])
def test_a_worker_that_others_could_reach_needs_certificates(address):
    with pytest.raises(ConfigError, match=r"can be reached from other hosts, .* in the clear; give --certs DIR"):
        check_worker_address(address, None)
    assert check_worker_address(address, Path("certs")) == address


@pytest.mark.parametrize(
    "address",
    ["", ":9000", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http", "::1:9000", "dns:///w:9000", "w/:1", "/run/worker"],
)
def test_what_is_not_an_address(address):
    for certs in (None, Path("certs")):
        with pytest.raises(ConfigError, match="is not a worker address"):
            check_worker_address(address, certs)


def test_every_address_of_a_config_is_checked():
    engine = EngineConfig(model="m")
    with pytest.raises(ConfigError, match="other hosts"):
        WorkerConfig(role="decode", engine=engine, listen="0.0.0.0:1", store=SOCKET)
    for role in ("prefill", "decode"):
        with pytest.raises(ConfigError, match="other hosts"):
            dataclasses.replace(ROUTER, **{role: ("127.0.0.1:1", "10.0.0.1:1")})
        dataclasses.replace(ROUTER, **{role: ("127.0.0.1:1", "10.0.0.1:1")}, certs=Path("certs"))
    with pytest.raises(ConfigError, match="at least one decode"):
        dataclasses.replace(ROUTER, decode=())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2"])
def test_without_tenants_nobody_else_may_reach_the_router(host):
    with pytest.raises(ConfigError, match="kvferry keys create"):
        dataclasses.replace(ROUTER, host=host)
    assert dataclasses.replace(ROUTER, host=host, tenants_file=Path("t")).host == host


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_size": 0},
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": -1},
        {"max_waiting": 0},
        {"max_model_len": 0},
        {"num_blocks": 0},
        {"threads": 0},
        {"dtype": "int8"},
    ],
)
def test_an_engine_that_could_not_work(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match="num_gpu_blocks_override" if name == "num_blocks" else name):
        EngineConfig(model="m", **wrong)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"size_bytes": 2**20 - 1}, "size is 1048575; it must be at least 1MiB"),
        ({"lease_s": 0.1}, "lease_seconds is 0.1; it must be at least 0.2"),
        ({"socket": Path("/" + "s" * 120)}, "too long"),
    ],
)
def test_a_store_that_could_not_work(wrong, word):
    with pytest.raises(ConfigError, match=word):
        StoreConfig(**{"socket": SOCKET, **wrong})


@pytest.mark.parametrize("kind", [EngineConfig, RouterConfig, StoreConfig, WorkerConfig])
def test_configs_are_frozen_and_take_no_unknown_key(kind):
    assert kind.__dataclass_params__.frozen
    with pytest.raises(TypeError, match="unexpected keyword"):
        kind(no_such_setting=1)


def test_the_environment_is_ours_or_not(monkeypatch):
    monkeypatch.setenv("KVFERRY_ROUTER_PORT", "1")
    monkeypatch.setenv("OTHER", "2")
    assert config.environment()["KVFERRY_ROUTER_PORT"] == "1"
    assert "OTHER" not in config.environment()
    foreign = config.foreign_environment()
    assert foreign["OTHER"] == "2"
    assert not [name for name in foreign if name.startswith("KVFERRY_")]


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x" / "kvferry"
    assert cache_dir().is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(config.Path, "home", lambda: tmp_path / "home")
    assert cache_dir() == tmp_path / "home" / ".cache" / "kvferry"
