"""`kvferry tenants`: list the tenants of a tenants file, and erase one. And what `kvferry keys` shares with it."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.cli.run import plain_errors

TenantsPath = Annotated[
    Path, typer.Option("--tenants-file", envvar="KVFERRY_ROUTER_TENANTS_FILE", help="The tenants file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(no_args_is_help=True, help="List and erase tenants; `kvferry keys create` makes them.")


@app.command("list", epilog="Example: kvferry tenants list --tenants-file tenants.toml --json")
def list_tenants(tenants_file: TenantsPath, as_json: AsJson = False) -> None:
    """Show the tenants with their limits, and the pseudonym by which workers and the store know each."""
    from kvferry.common.clock import WallClock
    from kvferry.router.tenants import Tenants
    from kvferry.router.tenants_file import read_file

    with plain_errors("tenants list"):
        file = read_file(tenants_file)
    tenants = Tenants.of(file, WallClock())
    show(
        [
            {
                "tenant": name,
                "pseudonym": tenants[name].keys.pseudonym,
                "keys": sum(key.tenant == name for key in file.keys),
                "limits": file.limits | file.tenants[name].limits,
            }
            for name in file.tenants
        ],
        as_json,
    )


@app.command(epilog="Example: kvferry tenants erase acme --tenants-file tenants.toml --yes")
def erase(
    tenant: Annotated[str, typer.Argument(help="Whose salt, keys and limits are destroyed.")],
    tenants_file: TenantsPath,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Destroy TENANT's salt, its keys and its limits.

    Without the salt nobody can find or open its cached blocks again, also not a tenant that is made under the same
    name. A copy of the file would undo that: destroy copies too.
    """
    from kvferry.common.errors import ConfigError
    from kvferry.router.tenants_file import read_file, without_tenant, write_file

    with plain_errors("tenants erase"):
        without_tenant(read_file(tenants_file), tenant)
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError(f"this cannot be undone; to erase {tenant} without being asked, give --yes")
            typer.confirm(f"Erase {tenant}, with its keys and all it has cached? It cannot be undone.", abort=True)
        with alone(tenants_file):
            write_file(tenants_file, without_tenant(read_file(tenants_file), tenant))
    print(f"{tenant} is erased; running routers refuse its keys within 2 s and end what it has under way")


def show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Rows of the same columns: as JSON, as a table on a terminal, or as lines whose columns are below their names and
    apart by two spaces or more; nothing where there are none."""
    if as_json:
        print(json.dumps(rows, indent=2))
    elif sys.stdout.isatty():
        _show_table(rows)
    elif rows:
        lines = [list(rows[0]), *([text_of(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())


def _show_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*(rows[0] if rows else ["nothing yet; see `kvferry keys create`"]))
    for row in rows:
        table.add_row(*map(text_of, row.values()))
    Console().print(table)


def text_of(value: Any) -> str:
    """A value in a table or line."""
    if isinstance(value, dict):
        return " ".join(f"{name}={one}" for name, one in value.items()) or "-"
    return "-" if value is None else str(value)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the file's folder locked, that of the file itself where `path` is a link, so that two changes at once do not
    lose one."""
    from kvferry.common.errors import ConfigError

    parent = os.path.dirname(os.path.realpath(path))
    try:
        folder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{parent} is not a folder that can be read: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
