"""The `kvferry` command. Nothing heavy is imported before a command needs it, so that help is quick."""

import shutil
import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from kvferry.cli import certs, check_config, demo, doctor, keys, roles, serve, tenants
from kvferry.cli.flags import mistyped, spread, with_flags
from kvferry.cli.run import EXIT_CONFIG, tell_failure
from kvferry.common.config import silence_grpc

WIDTH = 120  # of help that is no terminal's
EXIT_INTERRUPTED = 130

commands = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
commands.command("serve", epilog="Example: kvferry serve demo --port 8000 --store-size 4GiB")(
    with_flags("serve", serve.FLAGS, serve.serve)
)
commands.command("demo", epilog="Example: kvferry demo --model Qwen/Qwen2.5-0.5B-Instruct")(demo.demo)
commands.command("store", epilog="Example: kvferry store --socket /run/kvferry/store --size 4GiB")(
    with_flags("store", roles.FLAGS["store"], roles.store, roles.STORE_EXTRA)
)
commands.command(
    "prefill",
    epilog="Example: kvferry prefill Qwen/Qwen2.5-0.5B --listen unix:/run/kvferry/p0 --store /run/kvferry/store",
)(with_flags("prefill", roles.FLAGS["prefill"], roles.worker("prefill")))
commands.command(
    "decode",
    epilog="Example: kvferry decode Qwen/Qwen2.5-0.5B --listen unix:/run/kvferry/d0 --store /run/kvferry/store",
)(with_flags("decode", roles.FLAGS["decode"], roles.worker("decode")))
commands.command(
    "router",
    epilog="Example: kvferry router --model Qwen/Qwen2.5-0.5B --prefill unix:/run/kvferry/p0 "
    "--decode unix:/run/kvferry/d0 --store /run/kvferry/store",
)(with_flags("router", roles.FLAGS["router"], roles.router))
commands.command("check-config", epilog="Example: kvferry check-config --config kvferry.toml --port 9000")(
    with_flags("check-config", check_config.FLAGS, check_config.check_config, check_config.EXTRA)
)
commands.command(
    "doctor",
    epilog="Example: kvferry doctor --certs /etc/kvferry/certs --prefill 10.0.0.1:7710 --decode 10.0.0.2:7720",
)(with_flags("doctor", doctor.FLAGS, doctor.doctor, doctor.EXTRA))
commands.add_typer(keys.app, name="keys")
commands.add_typer(tenants.app, name="tenants")
commands.add_typer(certs.app, name="certs")


@commands.command("version", epilog="Example: kvferry version")
def print_version() -> None:
    """Print the version."""
    print(installed_version("kvferry"))


def version_and_exit(asked: bool) -> None:
    if asked:
        print_version()
        raise typer.Exit


@commands.callback(epilog="Example: kvferry serve demo")
def every_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=version_and_exit, help="Print the version.")
    ] = False,
) -> None:
    """Serve language models with prefill and decode on separate processes, and the KV in a shared block store."""


def app() -> int:
    """Run the command line; the exit code. What a person mistyped is told in one line, with exit code 2."""
    from typer import rich_utils

    silence_grpc()
    rich_utils.MAX_WIDTH = shutil.get_terminal_size((WIDTH, 50)).columns
    try:
        return typer.main.get_command(commands).main(spread(sys.argv[1:]), standalone_mode=False) or 0
    except typer.TyperException as error:
        if message := mistyped(error):
            context = getattr(error, "ctx", None)
            tell_failure(context.command_path.removeprefix("kvferry").strip() if context else "", message)
        return EXIT_CONFIG
    except typer.Abort:
        return EXIT_INTERRUPTED
