"""`kvferry keys`: make, list and revoke API keys in a tenants file."""

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from kvferry.cli.run import plain_errors
from kvferry.cli.tenants import AsJson, TenantsPath, alone, show

UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
SPAN = re.compile(r"(\d{1,5})([hdw])")

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")


@app.command(epilog="Example: kvferry keys create acme --tenants-file tenants.toml --expires 90d")
def create(
    tenant: Annotated[str, typer.Argument(help="Who the key stands for; made if not there.")],
    tenants_file: TenantsPath,
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="12h, 30d, 4w or a time such as 2027-01-31T00:00Z.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key for TENANT and print it, this once. Makes the file if it is not there."""
    from kvferry.router.tenants_file import new_file, read_file, with_key, write_file

    with plain_errors("keys create"):
        until = expiry(expires, datetime.now(UTC)) if expires is not None else None
        with alone(tenants_file):
            file = read_file(tenants_file) if tenants_file.exists() else new_file()
            changed, key = with_key(file, tenant, until)
            write_file(tenants_file, changed)
    if as_json:
        made = changed.keys[-1]
        print(json.dumps({"id": made.id, "tenant": tenant, "key": key, "expires": iso(made.expires)}))
        return
    print(key)
    if sys.stdout.isatty():
        print("Keep it: it is shown this once.", file=sys.stderr)


@app.command("list", epilog="Example: kvferry keys list --tenants-file tenants.toml --json")
def list_keys(tenants_file: TenantsPath, as_json: AsJson = False) -> None:
    """Show key ids, their tenants, and until when they are good. Nobody can show a key's secret again."""
    from kvferry.router.tenants_file import read_file

    with plain_errors("keys list"):
        file = read_file(tenants_file)
    now = datetime.now(UTC)
    show(
        [
            {
                "id": key.id,
                "tenant": key.tenant,
                "created": iso(key.created),
                "expires": iso(key.expires),
                "state": "expired" if key.expires is not None and key.expires <= now else "valid",
            }
            for key in file.keys
        ],
        as_json,
    )


@app.command(epilog="Example: kvferry keys revoke 3f9a1c2e5b7d --tenants-file tenants.toml")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id: the middle of kvf-ID-SECRET.")],
    tenants_file: TenantsPath,
) -> None:
    """Take a key out of the file. Its tenant stays, with its other keys and what it has cached."""
    from kvferry.router.tenants_file import key_id_of, read_file, without_key, write_file

    with plain_errors("keys revoke"), alone(tenants_file):
        key_id = key_id_of(key_id)
        write_file(tenants_file, without_key(read_file(tenants_file), key_id))
    print(f"{key_id} is revoked; running routers refuse it within 2 s, and finish what it has under way")


def expiry(text: str, now: datetime) -> datetime:
    """The time that `--expires` means, to the second; one without a time zone is UTC. Raises ConfigError."""
    from kvferry.common.errors import ConfigError
    from kvferry.router.tenants_file import shown_name

    try:
        if span := SPAN.fullmatch(text):
            when = now + int(span[1]) * UNITS[span[2]]
        else:
            when = datetime.fromisoformat(text)
            when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
            when = when.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"--expires {shown_name(text)} is no time; write it like 12h, 30d, 4w or 2027-01-31T00:00Z"
        ) from None
    if when <= now:
        raise ConfigError(f"--expires {text} is over already; give a time to come")
    return when.replace(microsecond=0)


def iso(when: datetime | None) -> str | None:
    return when and when.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
