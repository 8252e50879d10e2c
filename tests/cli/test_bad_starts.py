"""Every bad start is one line on stderr, exit code 2, no traceback; and it is told before anything is loaded."""

import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import kvferry

from kvferry.cli import checks, serve
from kvferry.cli.flags import understood
from kvferry.cli.foreign import FOREIGN
from kvferry.cli.layers import resolve
from kvferry.cli.models import Found, no_progress
from kvferry.cli.plan import make_plan
from kvferry.cli.roles import FLAGS
from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError, IncompatibleNode
from kvferry.common.process import available_memory, claim_socket_path

PORTS = ("--port=0", "--admin-port=0")


def write_model(folder: Path, elements: int = 8, there: int | None = None, **told: object) -> Path:
    """A folder that looks like a model with one bf16 tensor; `there`: bytes of it that the file really has; `told`:
    more of its config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | told))
    (folder / "tokenizer.json").touch()
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


@pytest.fixture
def hub():
    """A hub that has nothing. `status` and `code`: what it says to everything."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(server.status)
            self.send_header("X-Error-Code", server.code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


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
        assert refusal("serve", "nobody/nothing", *PORTS, **hub) == (
            "kvferry serve: there is no folder nobody/nothing, and as a model of the hub it cannot be had: "
            f"{tmp_path}/hub does not hold it, and HF_HUB_OFFLINE is set, so nothing is fetched; give a local folder, "
            "or `demo`, which needs no network"
        )

    @pytest.mark.parametrize(
        ("status", "code", "says"),
        [
            (0, "", "the hub at {hub} did not give it (Connection refused), and {cache}/hub does not hold it; give"),
            (404, "RepoNotFound", "the hub at {hub} does not have it, or not without a token that may read it, in the"),
            (403, "GatedRepo", "the hub at {hub} asks to accept its terms there, and for a token that may read it, in"),
            (
                404,
                "RevisionNotFound",
                "the hub at {hub} has it, but not at revision v9; give a local folder, or `demo`",
            ),
            (500, "", "the hub at {hub} did not give it (Server error '500 "),
        ],
    )
    def test_one_that_cannot_be_fetched(self, status, code, says, start, tmp_path, hub):
        """What was tried, how it ended, and what there is instead."""
        hub.status, hub.code = status, code
        if not status:
            hub.server_close()
        url, cache = f"http://127.0.0.1:{hub.server_port}", tmp_path / "cache"
        router = ("router", "--model=nobody/nothing", "--revision=v9", "--decode=unix:/d", "--store=/s", *PORTS)
        for command in (start("nobody/nothing", "--revision=v9"), router):
            told = refusal(*command, HF_ENDPOINT=url, HF_HOME=str(cache))
            assert ": there is no folder nobody/nothing, and as a model of the hub it cannot be had: " in told
            assert says.format(hub=url, cache=cache) in told
            assert told.endswith("; give a local folder, or `demo`, which needs no network")

    def test_what_cannot_be_a_models_id(self, start):
        assert "it cannot be had: this is no model's id, which is like OWNER/NAME; give" in refusal(*start("a b"))

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
        found = Found(
            tmp_path, "m", SimpleNamespace(), (write_model(tmp_path / "m", elements=2**19) / "model.safetensors",)
        )
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
            ": --socket is not given; give it, store.socket in a --config file or KVFERRY_STORE_SOCKET"
        )


SHAPE = {"num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "hidden_size": 64}
QUANTIZED = {"quantization_config": {"quant_method": "awq"}}


@pytest.fixture
def look(tmp_path):
    """What `serve` and `check-config` look at before anything is started, of a model whose config.json says more."""

    def looked(told: dict[str, object], **flags: object) -> None:
        said = {"engine.model": str(write_model(tmp_path / "m", **told)), "router.port": "0", "router.admin_port": "0"}
        said |= {path.replace("__", ".", 1): value for path, value in flags.items()}
        settings = resolve(serve.FLAGS.names(), said, {}, None)
        serve.look(make_plan(settings, tmp_path, 2), no_progress)

    return looked


class TestBeforeAnythingIsStarted:
    @pytest.mark.parametrize(
        ("told", "flags", "says"),
        [
            (
                SHAPE,
                {"kv_cache_size": "8191"},
                "--kv-cache-size 8191 does not hold one block of 16 tokens, which is 8KiB",
            ),
            (SHAPE, {"kv_cache_size": "1", "dtype": "bfloat16"}, "which is 4KiB of m"),
            ({"n_positions": 99}, {"max_model_len": "100"}, "--max-model-len 100 is more than the 99 positions"),
            ({"torch_dtype": "float8_e4m3fn"}, {}, "the checkpoint is in float8_e4m3fn; choose --dtype"),
            ({"model_type": None}, {}, "m holds no usable config.json: it names no model_type"),
            ({"num_hidden_layers": "two", **SHAPE, "hidden_size": "x"}, {}, "m holds no usable config.json: "),
            ({"architectures": ["FalconForCausalLM"]}, {}, "FalconForCausalLM cannot be served: it attends on its own"),
            (QUANTIZED, {}, r"llama cannot be served: its weights are quantized \(awq\)"),
            ({"vision_config": {}}, {}, "llama cannot be served: it joins several models"),
        ],
    )
    def test_a_config_that_cannot_be_served(self, look, told, flags, says):
        with pytest.raises((ConfigError, IncompatibleNode), match=says):
            look(told, **{f"engine__{name}": value for name, value in flags.items()})

    def test_what_the_config_leaves_open_is_no_fault(self, look):
        look({}, engine__max_model_len="1M", engine__kv_cache_size="1")
        look({**SHAPE, "architectures": None, "max_position_embeddings": 99}, engine__kv_cache_size="8KiB",
             engine__max_model_len="99")  # fmt: skip

    @pytest.mark.parametrize(
        ("flag", "words", "says"),
        [
            ("decode_arg", ["--failpont=a=kill"], "--decode-arg: there is no --failpont; did you mean --failpoint"),
            ("decode_arg", ["other"], "--decode-arg: Got unexpected extra argument"),
            ("prefill_arg", ["--block-size=0"], "--prefill-arg: --block-size is 0; it must be at least 1"),
            ("prefill_arg", ["--max-model-len=100"], "--max-model-len 100 is more than the 99 positions"),
            ("router_arg", ["--port=high"], "--router-arg: --port: 'high' is not a whole number"),
            ("router_arg", ["--tenants-file=/no/such"], "there is no tenants file /no/such"),
            ("store_arg", ["--lease-seconds=0"], "--store-arg: --lease-seconds is 0; it must be at least 0.2"),
            ("store_arg", ["--size=4000TiB"], "and 4096000.0 GiB of store"),
        ],
    )
    def test_an_argument_of_one_role(self, look, flag, words, says):
        with pytest.raises(ConfigError, match=says):
            look({"max_position_embeddings": 99}, **{f"serve__{flag}": words})

    def test_no_gpu(self, look, monkeypatch):
        monkeypatch.setattr(checks, "GPUS", ())
        with pytest.raises(ConfigError, match="--device cuda:1: there is no GPU on this host; use --device cpu"):
            look({}, engine__device="cuda:1")
        monkeypatch.setattr(checks, "GPUS", (Path("/dev/null"),))
        look({}, engine__device="cuda:1")
        with pytest.raises(ConfigError, match=r"a store of 4096000\.0 GiB does not fit into"):
            look({}, engine__device="cuda:1", store__size="4000TiB")

    def test_no_tokenizer(self, look, tmp_path):
        look({})
        (tmp_path / "m" / "generation_config.json").write_text('{"top_p": 2}')
        look({}, router__generation_config="vllm")
        with pytest.raises(ConfigError, match=r"generation_config\.json is not valid"):
            look({})
        (tmp_path / "none").mkdir()
        with pytest.raises(ConfigError, match=r"none cannot be loaded: there is no tokenizer\.json"):
            checks.check_text_side(tmp_path / "none", "auto")

    @pytest.mark.parametrize(
        ("flag", "variables", "says"),
        [
            ("--max-model-len=100", {}, "--max-model-len 100 is more than the 99 positions this model was made for"),
            ("--decode-arg=--zzz", {}, "--decode-arg: there is no --zzz; `kvferry decode --help` lists what there is"),
            ("--seed=1", {}, "there is no --seed here: each request has its own `seed`"),
            ("--port=0", {"KVFERRY_DECODE_LISTEN": "nowhere"},
             "'nowhere' is not a worker address; write unix:/path or 127.0.0.1:PORT"),
        ],
    )  # fmt: skip
    def test_check_config_says_the_same(self, tmp_path, flag, variables, says):
        model = write_model(tmp_path / "m", max_position_embeddings=99)
        for command in ("serve", "check-config"):
            refused = kvferry(command, model, *PORTS, flag, **variables)
            assert (refused.returncode, refused.stderr) == (2, f"kvferry {command}: {says}\n")

    def test_check_config_sees_a_port_in_use(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            refused = kvferry("check-config", "--admin-port=0", f"--port={port}")
        assert refused.returncode == 2
        assert "router.port" in refused.stdout, "what is configured is told all the same"
        assert f"cannot listen on 127.0.0.1 port {port}" in refused.stderr


def test_what_only_a_child_sees_is_said_once(tmp_path):
    """It ends with the sentence of the child alone."""
    model = write_model(tmp_path / "m")
    nowhere = f"{tmp_path}/none/s"
    refused = kvferry(
        "serve", model, *PORTS, "--store-size=1MiB", f"--store-arg=--socket={nowhere}", "--log-level=ERROR"
    )
    assert refused.returncode == 2
    assert refused.stderr == (
        f"kvferry serve: store did not start: there is no folder {tmp_path}/none for the socket of the store; make it "
        "first\n"
    )


@pytest.mark.parametrize("arguments", [("serve", "/no/such"), ("store",), ("decode", "--port=1"), ("router", "--zzz")])
def test_the_last_words_are_a_json_line_for_a_log_collector(arguments):
    refused = kvferry(*arguments, KVFERRY_LOG_FORMAT="")
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    told = json.loads(line)
    assert (told["level"], told["role"]) == ("error", arguments[0])
    plain = kvferry(*arguments, KVFERRY_LOG_FORMAT="text").stderr
    assert plain == f"kvferry {arguments[0]}: {told['message']}\n"


def test_what_a_flag_says_of_the_log_counts_for_the_last_words_too():
    refused = kvferry("serve", "--port=high", "--log-format=json")
    assert json.loads(refused.stderr)["message"].startswith("--port: 'high'")
    assert kvferry("check-config", "--port=high", KVFERRY_LOG_FORMAT="").stderr.startswith(
        "kvferry check-config: --port"
    )


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_what_other_servers_call_otherwise(name):
    """None of them is a flag of `serve`, and each has one line."""
    assert name not in serve.FLAGS.names().values()
    for role, flags in {**FLAGS, "serve": serve.FLAGS}.items():
        if name in flags.names().values():
            continue  # `router --model`
        with pytest.raises(ConfigError) as told:
            understood(role, flags, [name])
        assert str(told.value) == f"there is no {name} here: {FOREIGN[name]}"
