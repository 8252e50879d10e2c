"""The command line as a person or a script meets it: real `kvferry` processes."""

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from command_line import KVFERRY, kvferry

from kvferry.cli.checks import open_port
from kvferry.cli.demo_model import demo_model
from kvferry.cli.models import resolve
from kvferry.cli.plan import shared_out
from kvferry.cli.serve import private_folder
from kvferry.common.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--host", "0.0.0.0"), "without a tenants file everyone who reaches 0.0.0.0 would share one tenant"),
        (("--store-size", "big"), "--store-size: 'big' is not a size"),
    ],
)
def test_serve_refuses_before_it_starts_anything(tmp_path, arguments, says):
    (tmp_path / "config.json").write_text("{}")
    refused = kvferry("serve", tmp_path, "--port", 0, "--admin-port", 0, *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"kvferry serve: {says}")
    assert refused.stderr.count("\n") == 1
    assert refused.stdout == ""


def test_serve_says_when_a_port_is_taken(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = kvferry("serve", tmp_path, "--port", port, "--admin-port", 0)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"kvferry serve: cannot listen on 127.0.0.1 port {port}: Address already in use; give another --port\n"
    )


def test_a_role_tells_its_parent_why_it_fails(tmp_path):
    read_end, write_end = os.pipe()
    command = [KVFERRY, "store", "--socket", tmp_path / "s", "--size", "1KiB", "--notify-fd", str(write_end)]
    refused = subprocess.run(command, pass_fds=(write_end,), capture_output=True, text=True, timeout=60, check=False)
    os.close(write_end)
    with open(read_end) as pipe:
        told = pipe.read()
    sentence = "--size is 1KiB; it must be at least 1MiB"
    assert refused.returncode == 2
    assert refused.stderr == "", "said twice: the parent says it"
    assert told == f'{{"failed":"{sentence}"}}\n'


def test_a_role_ends_when_its_parent_has(tmp_path):
    refused = kvferry("store", "--socket", tmp_path / "s", "--size", "1MiB", "--parent-pid", 1)
    assert refused.returncode == 2
    assert "the process that started this one has ended" in refused.stderr


def test_demo_model_is_made_once_and_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = []
    path, name = resolve("demo", lambda *progress: seen.append(progress))
    assert name == "demo"
    parts = len(seen) - 1
    assert seen == [("make", 0, 0), *(("make", done, parts) for done in range(1, parts + 1))]
    assert {file.name for file in Path(path).iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja"}  # fmt: skip
    made_at = Path(path).stat().st_mtime_ns
    assert str(demo_model()) == path
    assert Path(path).stat().st_mtime_ns == made_at
    assert [folder.name for folder in Path(path).parent.iterdir()] == [Path(path).name]


def test_other_models_pass_through(tmp_path):
    assert resolve("Qwen/Qwen2.5-0.5B") == ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B")
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == (str(tmp_path.resolve()), tmp_path.name)


@pytest.mark.parametrize(
    ("cores", "workers", "shares"), [(2, 2, [1, 1]), (8, 2, [4, 4]), (5, 2, [3, 2]), (1, 3, [1, 1, 1])]
)
def test_cores_are_shared_out(cores, workers, shares):
    assert shared_out(cores, workers) == shares


def test_private_folder_is_private_and_short():
    with private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(str(folder / "prefill-100")) < 100
    assert not folder.exists()


def test_open_port():
    port = open_port("127.0.0.1", 0, "--port")
    assert open_port("127.0.0.1", port, "--port") == port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use; give another --admin-port"):
            open_port("127.0.0.1", port, "--admin-port")
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 port 0: .*; give another --admin-host"):
        open_port("192.0.2.1", 0, "--admin-port")


@pytest.mark.parametrize(
    ("model", "says"),
    [("/no/such/folder", "there is no folder /no/such/folder"), ("./nope", "there is no folder ./nope"),
     ("/tmp", "/tmp is a folder without a config.json")],
)  # fmt: skip
def test_serve_looks_for_the_model_first(model, says):
    refused = kvferry("serve", model, "--port", 0, "--admin-port", 0)
    assert refused.returncode == 2
    assert says in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_store_that_the_host_cannot_hold_is_refused(tmp_path):
    refused = kvferry("store", "--socket", tmp_path / "store", "--size", "4000TiB")
    assert refused.returncode == 2
    assert "does not fit into" in refused.stderr


def test_a_log_level_that_is_none_is_refused():
    refused = kvferry("store", "--socket", "/tmp/never", "--log-level", "LOUD")
    assert refused.returncode == 2
    assert "--log-level is 'LOUD'; use DEBUG, INFO, WARNING or ERROR" in refused.stderr
