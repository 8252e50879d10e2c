"""Help that can be read, and what is told of what was mistyped."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from command_line import kvferry
from typer.main import get_command

from kvferry.cli.main import commands

HEAVY = {"torch", "transformers", "grpc", "aiohttp", "numpy"}


def walk(command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command there is, with the words that call it."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*path, name))


EVERY_COMMAND = dict(walk(get_command(commands)))


@pytest.mark.parametrize("path", EVERY_COMMAND, ids=" ".join)
def test_every_help_has_an_example_and_is_not_cut(path):
    """Piped, so wider than 80 columns; each flag is there in full, with what it does."""
    shown = kvferry(*path, "--help", COLUMNS="")
    assert shown.returncode == 0
    assert "…" not in shown.stdout
    words = shown.stdout.split()
    command = EVERY_COMMAND[path]
    assert command.help
    if not getattr(command, "commands", None):
        assert f"Example: kvferry {' '.join(path)}" in shown.stdout
    for param in command.params:
        if param.param_type_name == "option" and not param.hidden:
            assert param.help
            assert param.opts[0] in words
    assert max(map(len, shown.stdout.splitlines())) == 120


def test_help_is_as_wide_as_the_terminal():
    assert max(map(len, kvferry("serve", "--help", COLUMNS="170").stdout.splitlines())) == 170


def test_help_imports_nothing_heavy():
    check = f"import sys, kvferry.cli.main; heavy = {HEAVY} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    assert subprocess.run([sys.executable, "-c", check], cwd="/", check=False).returncode == 0


def test_version():
    assert kvferry("version").stdout == kvferry("--version").stdout == "0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "--max-model-length", "5"), "kvferry serve: there is no --max-model-length; did you mean "
                                               "--max-model-len?"),
        (("router", "--max-prompt"), "kvferry router: there is no --max-prompt; did you mean --max-prompts?"),
        (("store", "--peer-secret=x"), "kvferry store: there is no --peer-secret; did you mean --peer-secret-file?"),
        (("store", "--redis-pass"), "kvferry store: there is no --redis-pass; `kvferry store --help` lists what there "
                                    "is"),
        (("router", "--max"), "kvferry router: there is no --max; `kvferry router --help` lists what there is"),
        (("serve", "--zzz"), "kvferry serve: there is no --zzz; `kvferry serve --help` lists what there is"),
        (("serv",), "kvferry: No such command 'serv'. Did you mean 'serve'?"),
        (("serve", "demo", "--port"), "kvferry: Option '--port' requires an argument; `kvferry --help` lists what "
                                      "there is"),
        (("serve", "demo", "--port", "high"), "kvferry serve: --port: 'high' is not a whole number; write it like "
                                              "32768, 32K (that is 32768) or 32k (32000)"),
        (("decode", "demo", "--listen", "unix:/s", "--store", "/t", "--dtype", "int8"),
         "kvferry decode: --dtype is 'int8'; use auto, float32, bfloat16 or float16"),
    ],
)  # fmt: skip
def test_what_is_mistyped_is_told_in_one_line(arguments, says):
    refused = kvferry(*arguments)
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", f"{says}\n")


@pytest.mark.parametrize("role", ["store", "prefill", "decode", "router", "serve"])
def test_a_wrong_value_is_told_before_anything_heavy_is_imported(role):
    check = (
        "import sys; from kvferry.cli.main import app; "
        f"sys.argv = ['kvferry', {role!r}, '--log-format', 'xml']; code = app(); "
        f"heavy = {HEAVY} & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
    )
    refused = subprocess.run([sys.executable, "-c", check], cwd="/", capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert refused.stderr == f"kvferry {role}: --log-format is 'xml'; use auto, text or json\n"
