"""`kvferry keys`: make, list and revoke API keys in a tenants file."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.run import plain_errors

TenantsPath = Annotated[Path, typer.Option("--tenants-file", help="The tenants file.")]

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")


@app.command(epilog="Example: kvferry keys create acme --tenants-file tenants.toml")
def create(
    tenant: Annotated[str, typer.Argument(help="Who the key stands for; made if not there.")],
    tenants_file: TenantsPath,
) -> None:
    """Make a key for TENANT and print it, this once. Makes the file if it is not there."""
    from kvferry.router.tenants_file import new_file, read_file, with_key, write_file

    with plain_errors("keys create"), _alone(tenants_file):
        file = read_file(tenants_file) if tenants_file.exists() else new_file()
        changed, key = with_key(file, tenant)
        write_file(tenants_file, changed)
    print(key)


@app.command("list", epilog="Example: kvferry keys list --tenants-file tenants.toml")
def list_keys(tenants_file: TenantsPath) -> None:
    """Show key ids and their tenants. Nobody can show a key's secret again."""
    from kvferry.router.tenants_file import read_file

    with plain_errors("keys list"):
        file = read_file(tenants_file)
    for key in file.keys:
        print(f"{key.id}  {key.tenant}")


@app.command(epilog="Example: kvferry keys revoke 3f9a1c2e5b7d --tenants-file tenants.toml")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id: the middle of kvf-ID-SECRET.")],
    tenants_file: TenantsPath,
) -> None:
    """Take a key out of the file. A running router goes on accepting it until it is started again."""
    from kvferry.router.tenants_file import read_file, without_key, write_file

    with plain_errors("keys revoke"), _alone(tenants_file):
        write_file(tenants_file, without_key(read_file(tenants_file), key_id))
    print(f"{key_id} is revoked; a running router accepts it until it is started again")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the file's folder locked, so that two changes at once do not lose one."""
    from kvferry.common.errors import ConfigError

    try:
        folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{path.absolute().parent} is not a folder that can be read: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
