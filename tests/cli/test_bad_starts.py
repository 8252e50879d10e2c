"""Every bad start is one line on stderr, exit code 2, no traceback; and it is told before anything is loaded."""

import json
import socket
import struct
from pathlib import Path

import pytest
from command_line import kvferry

from kvferry.cli import checks
from kvferry.cli.models import Found
from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError
from kvferry.common.process import available_memory, claim_socket_path

PORTS = ("--port=0", "--admin-port=0")


def write_model(folder: Path, elements: int = 8, there: int | None = None) -> Path:
    """A folder that looks like a model with one bf16 tensor; `there`: bytes of it that the file really has."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    header = json.dumps({"w": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]}}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (2 * elements if there is None else there))  # sparse
    return folder


def refusal(*arguments: object, **environment: str) -> str:
    """The one line that a command says before it ends with exit code 2."""
    refused = kvferry(*arguments, **environment)
    assert refused.returncode == 2, refused.stderr
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1, refused.stderr
    return refused.stderr.rstrip()


def worker(folder: Path, model: object, *flags: str) -> tuple[object, ...]:
    return ("decode", model, f"--listen=unix:{folder}/d", f"--store={folder}/s", *flags)


@pytest.fixture(params=["serve", "decode"])
def start(request, tmp_path):
    """How a model is started: whole, or a worker alone."""
    return lambda model, *flags: (
        ("serve", model, *PORTS, *flags) if request.param == "serve" else worker(tmp_path, model, *flags)
    )


class TestModels:
    def test_missing(self, start):
        assert refusal(*start("/no/such/folder")).endswith(": there is no folder /no/such/folder")

    def test_a_file(self, start, tmp_path):
        (tmp_path / "m.gguf").touch()
        assert "is a file; give the folder of a model" in refusal(*start(tmp_path / "m.gguf"))

    def test_no_config(self, start, tmp_path):
        assert "is a folder without a config.json" in refusal(*start(tmp_path))

    def test_a_damaged_config(self, start, tmp_path):
        (write_model(tmp_path / "m") / "config.json").write_text('{"model_type": ')
        assert "holds no usable config.json: Expecting value" in refusal(*start(tmp_path / "m"))

    def test_no_weights(self, start, tmp_path):
        (write_model(tmp_path / "m") / "model.safetensors").unlink()
        assert "holds no model.safetensors and no model.safetensors.index.json" in refusal(*start(tmp_path / "m"))

    def test_weights_cut_short(self, start, tmp_path):
        write_model(tmp_path / "m", elements=1000, there=999)
        assert "model.safetensors is not a whole safetensors file" in refusal(*start(tmp_path / "m"))

    def test_a_shard_that_is_missing(self, start, tmp_path):
        folder = write_model(tmp_path / "m")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
        assert "names model-1.safetensors, which is not there" in refusal(*start(folder))

    def test_one_that_the_hub_does_not_have(self, tmp_path):
        hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        told = refusal("serve", "nobody/nothing", *PORTS, **hub)
        assert "'nobody/nothing' is neither a folder nor a model of the hub's cache, and HF_HUB_OFFLINE is set" in told

    def test_one_that_does_not_fit(self, start, tmp_path):
        write_model(tmp_path / "m", elements=10**12)  # bfloat16
        told = refusal(*start(tmp_path / "m", "--device=cpu"))
        assert "m does not fit: 1862.6 GiB of weights and 1.0 GiB of KV pages" in told
        assert "of memory available; try a smaller --kv-cache-size" in told
        told = refusal(*start(tmp_path / "m", "--device=cpu", "--dtype=float32"))
        assert "m does not fit: 3725.3 GiB of weights and 1.0 GiB of KV pages" in told
        assert "of memory available; try --dtype bfloat16, a smaller --kv-cache-size" in told

    def test_kv_pages_that_do_not_fit(self, start, tmp_path):
        told = refusal(*start(write_model(tmp_path / "m"), "--device=cpu", "--kv-cache-size=50TiB"))
        assert "51200.0 GiB of KV pages" in told

    def test_each_worker_and_the_store_count(self, tmp_path, monkeypatch):
        found = Found(tmp_path, "m", (write_model(tmp_path / "m", elements=2**19) / "model.safetensors",))
        engine = EngineConfig(model="m", device="cpu", dtype="float32", kv_cache_bytes=2**20)
        monkeypatch.setattr(checks, "available_memory", lambda: 10 * 2**20)
        checks.check_memory(found, [engine] * 3, 2**20)  # 3 * (2 + 1) + 1 MiB
        with pytest.raises(ConfigError, match=r"for each of 3 workers, and 0\.0 GiB of store are .*--store-size"):
            checks.check_memory(found, [engine] * 3, 2**20 + 1)
        checks.check_memory(found, [EngineConfig(model="m", device="cuda")], 2**40)


class TestMemory:
    def test_a_store_larger_than_memory(self, tmp_path):
        told = refusal("store", f"--socket={tmp_path}/s", "--size=4000TiB")
        assert told.startswith("kvferry store: a store of 4096000.0 GiB does not fit into the")
        told = refusal("serve", write_model(tmp_path / "m"), *PORTS, "--store-size=4000TiB", "--device=cpu")
        assert "and 4096000.0 GiB of store" in told
        assert "--store-size" in told

    def test_what_is_available(self, tmp_path):
        (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 3000 kB\n")
        assert available_memory(tmp_path / "none", tmp_path / "meminfo") == 3000 * 1024
        (tmp_path / "memory.current").write_text("1000000\n")
        (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 400000\n")
        for limit, available in (("max", 3000 * 1024), ("2000000", 1400000), ("500000", 0), ("9000000", 3000 * 1024)):
            (tmp_path / "memory.max").write_text(f"{limit}\n")
            assert available_memory(tmp_path, tmp_path / "meminfo") == available


class TestPlaces:
    @pytest.mark.parametrize("flag", ["port", "admin-port"])
    @pytest.mark.parametrize("command", ["serve", "router"])
    def test_a_port_in_use(self, command, flag, tmp_path):
        which = {"serve": ("serve", write_model(tmp_path / "m")),
                 "router": ("router", "--model=demo", "--decode=unix:/d", "--store=/s")}[command]  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            told = refusal(*which, *PORTS, f"--{flag}={port}")
        assert told == (f"kvferry {command}: cannot listen on 127.0.0.1 port {port}: Address already in use; give "
                        f"another --{flag}")  # fmt: skip

    def test_one_port_for_both(self):
        assert "cannot both be at 127.0.0.1:8000" in refusal("serve", "demo", "--admin-port=8000")

    def test_a_workers_port_in_use(self, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            told = refusal("decode", "demo", f"--listen=127.0.0.1:{port}", "--store=/s")
        assert "give another --listen" in told

    def test_a_socket_path_that_is_too_long(self, tmp_path):
        path = f"/tmp/{'s' * 103}"
        assert len(path) == 108
        for command in (("store", f"--socket={path}"), ("decode", "demo", f"--listen=unix:{path}", "--store=/s"),
                        ("router", "--model=demo", f"--decode=unix:{path}", "--store=/s")):  # fmt: skip
            told = refusal(*command)
            assert f"{path}, is too long: it has 108 bytes, and a unix socket's has 107 at most" in told

    @pytest.mark.parametrize("command", ["store", "decode"])
    def test_a_socket_that_somebody_answers_at(self, command, tmp_path):
        path = tmp_path / "x"
        with socket.socket(socket.AF_UNIX) as alive:
            alive.bind(str(path))
            alive.listen()
            flags = ("store", f"--socket={path}") if command == "store" else (
                "decode", "demo", f"--listen=unix:{path}", "--store=/s")  # fmt: skip
            told = refusal(*flags)
        assert f"another process answers at {path}; stop it first, or give the {command}" in told
        assert path.is_socket()

    def test_a_socket_of_a_dead_process_is_taken_over(self, tmp_path):
        path = tmp_path / "x"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        claim_socket_path(path, "the store")
        assert not path.exists()
        claim_socket_path(path, "the store")

    def test_a_socket_with_a_full_backlog_is_alive(self, tmp_path):
        path = tmp_path / "x"
        with socket.socket(socket.AF_UNIX) as alive, socket.socket(socket.AF_UNIX) as first:
            alive.bind(str(path))
            alive.listen(0)
            first.connect(str(path))
            with pytest.raises(ConfigError, match="another process answers"):
                claim_socket_path(path, "the store")

    def test_a_file_in_the_sockets_place_is_kept(self, tmp_path):
        path = tmp_path / "precious"
        path.write_text("do not delete")
        assert f"{path} is there and is not a socket" in refusal("store", f"--socket={path}")
        assert path.read_text() == "do not delete"


class TestFiles:
    @pytest.mark.parametrize("command", ["serve", "router"])
    def test_a_tenants_file(self, command, tmp_path):
        """Missing, not a file, readable by others: looked at before the model is."""
        which = {"serve": ("serve", "/no/such/model"),
                 "router": ("router", "--model=/no", "--decode=unix:/d", "--store=/s")}  # fmt: skip
        path = tmp_path / "tenants.toml"
        told = refusal(*which[command], *PORTS, f"--tenants-file={path}")
        assert f"there is no tenants file {path}; make one with `kvferry keys create" in told
        path.touch(0o644)
        assert "chmod 600" in refusal(*which[command], *PORTS, f"--tenants-file={path}")
        assert "Is a directory" in refusal(*which[command], *PORTS, f"--tenants-file={tmp_path}")

    @pytest.mark.parametrize("command", ["serve", "store", "prefill", "decode", "router", "check-config"])
    def test_a_config_of_another_version(self, command, tmp_path):
        file = tmp_path / "kvferry.toml"
        file.write_text("version = 7\n")
        told = refusal(command, "--config", file)
        assert told == f"kvferry {command}: {file} is a configuration of version 7, and this kvferry reads version 1"

    def test_what_is_missing(self):
        assert refusal("store").endswith(
            "store.socket is not given; give --socket, store.socket in a --config file or KVFERRY_STORE_SOCKET"
        )


def test_what_only_a_child_sees_is_said_once(tmp_path):
    """A child's own argument, which `serve` passes on as it stands."""
    model = write_model(tmp_path / "m")
    refused = kvferry("serve", model, *PORTS, "--store-size=1MiB", "--store-arg=--lease-seconds=0", "--log-level=ERROR")
    assert refused.returncode == 2
    assert refused.stderr == ("kvferry serve: store did not start: leases of 0.0 s are too short; give at least 0.2\n")
