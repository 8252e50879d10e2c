"""`kvferry check-config`: what it prints, fed back, gives the same values."""

import json
import os
import subprocess
import tomllib
from pathlib import Path

import hypothesis
import pytest
from command_line import KVFERRY, kvferry
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cli.check_config import toml
from kvferry.cli.checks import check_values
from kvferry.cli.layers import Settings, Value, resolve
from kvferry.cli.settings import SETTINGS
from kvferry.common.errors import ConfigError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
OF_TYPE = {
    str: TEXTS,
    Path: TEXTS.filter(lambda text: "\n" not in text and "\x00" not in text and text[:1] not in ("~", "k")).map(Path),
    int: st.integers(0, 2**62),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
}


@st.composite
def some_settings(draw) -> Settings:
    """Any value of its type for each setting; whether it would be allowed is not asked here."""
    values = {}
    for path, setting in SETTINGS.items():
        value = draw(st.tuples(OF_TYPE[setting.hint]) if setting.many else st.none() | OF_TYPE[setting.hint])
        values[path] = Value(setting.default if value is None and not setting.required else value, "test")
    return Settings(values, {})


@hypothesis.settings(max_examples=25, deadline=None)
@given(some_settings())
def test_the_printed_file_gives_the_same_values(tmp_path_factory, settings):
    file = tmp_path_factory.mktemp("toml") / "kvferry.toml"
    file.write_bytes(toml(settings).encode())
    again = resolve({}, {}, {}, file)
    # What follows another setting is not given in the file when it had no value, so it follows again.
    own = [
        path for path, one in SETTINGS.items() if not one.field.metadata.get("follows") or settings[path] is not None
    ]
    assert {path: again[path] for path in own} == {path: settings[path] for path in own}


def test_round_trip_of_a_real_command(tmp_path):
    flags = ["demo", "--port=0", "--max-model-len=8K", "--store-size=1.5GiB", "--decode-arg=--failpoint=a=kill",
             "--decode-arg=--log-level=DEBUG", "--max-prompts=7", "--admin-port=0"]  # fmt: skip
    first = kvferry("check-config", *flags, "--toml", KVFERRY_ENGINE_DTYPE="float32")
    assert first.returncode == 0, first.stderr
    file = tmp_path / "kvferry.toml"
    file.write_text(first.stdout)
    told = tomllib.loads(first.stdout)
    assert told["version"] == 1
    assert told["engine"]["dtype"] == "float32"
    assert told["engine"]["max_model_len"] == 8192
    assert told["serve"]["decode_arg"] == ["--failpoint=a=kill", "--log-level=DEBUG"]
    assert told["router"]["limits"]["prompts"] == 7
    second = kvferry("check-config", "--toml", KVFERRY_CONFIG=str(file))
    assert second.stdout == first.stdout
    values = json.loads(kvferry("check-config", "--json", "--config", file).stdout)
    assert values["store.size"] == {"value": "1536MiB", "source": f"{file}: store.size"}
    assert values["engine.num_gpu_blocks_override"] == {"value": None, "source": "default"}


def test_one_way_to_print_is_enough():
    refused = kvferry("check-config", "--json", "--toml")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert (
        refused.stderr == "kvferry check-config: --json and --toml are two ways to print the same; give one of them\n"
    )


def test_every_source_is_told(tmp_path):
    file = tmp_path / "kvferry.toml"
    file.write_text("[router]\nadmin_port = 9001\n")
    shown = kvferry("check-config", "--config", file, "--port=9000", KVFERRY_ROUTER_HOST="127.0.0.2")
    rows = {
        row[0]: row[1:] for row in (line.rstrip().split(None, 2) for line in shown.stdout.splitlines()) if len(row) == 3
    }
    assert rows["router.port"] == ["9000", "--port"]
    assert rows["router.host"] == ["127.0.0.2", "KVFERRY_ROUTER_HOST"]
    assert rows["router.admin_port"] == ["9001", f"{file}: router.admin_port"]
    assert rows["router.limits.prompts"][1] == "default"
    assert set(SETTINGS) <= set(rows)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("router.port", 65536, "a port is a number from 0"),
        ("router.host", "10.0.0.1", "without a tenants file"),
        ("router.decode", ("10.0.0.1:1",), "can be reached from other hosts"),
        ("engine.dtype", "int8", "test is 'int8'; use auto, float32"),
        ("engine.device", "gpu", "test is 'gpu'; use auto, cpu"),
        ("decode.listen", "nowhere", "is not a worker address"),
        ("store.socket", Path("/" + 107 * "s"), "is too long: it has 108 bytes"),
        ("log_format", "xml", "test is 'xml'; use auto, text or json"),
        ("serve.decode", 0, "test is 0; it must be at least 1"),
    ],
)
def test_every_section_is_checked(path, value, says):
    settings = resolve({}, {}, {}, None)
    check_values(settings)
    wrong = Settings({**settings.values, path: Value(value, "test")}, {})
    with pytest.raises(ConfigError, match=says):
        check_values(wrong)


def test_it_says_in_one_line_what_is_wrong():
    refused = kvferry("check-config", KVFERRY_ROUTER_PROT="1")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr == (
        "kvferry check-config: there is no setting KVFERRY_ROUTER_PROT; did you mean KVFERRY_ROUTER_PORT?\n"
    )


def test_a_closed_pipe_is_no_traceback():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb") as closed:
        shown = subprocess.run([KVFERRY, "check-config"], stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert b"Traceback" not in shown.stderr
