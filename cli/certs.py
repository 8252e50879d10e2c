"""`kvferry certs`: make the certificates by which processes on several hosts know one another, renew and show them."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvferry.cli.run import EXIT_FAILED, plain_errors
from kvferry.cli.tenants import AsJson, alone, show

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the certificates.")]
Days = Annotated[int, typer.Option(min=1, max=36500, help="How long certificates are good.")]
CaDays = Annotated[int, typer.Option(min=1, max=36500, help="How long a new CA is good; no certificate outlasts it.")]

app = typer.Typer(no_args_is_help=True, help="Make, renew and show the certificates of processes on several hosts.")


@app.command(epilog="Example: kvferry certs init /etc/kvferry/certs")
def init(folder: Folder, days: Days = 365, ca_days: CaDays = 3650) -> None:
    """Make DIR with a CA, a certificate for each role, and the secret by which store nodes know one another."""
    from kvferry.cli.certs_folder import STORE_SECRET, make

    with plain_errors("certs init"):
        trust = make(folder, datetime.now(UTC), timedelta(days=days), timedelta(days=ca_days))
    print(f"{folder} has a CA, valid until {day(trust.issuing)}, and certificates.")
    tell_where_files_go(folder)
    print(f"  {'store':<8} {STORE_SECRET}, for --peer-secret-file")


@app.command(epilog="Example: kvferry certs rotate /etc/kvferry/certs --days 90")
def rotate(
    folder: Folder,
    days: Days = 365,
    new_ca: Annotated[bool, typer.Option("--ca", help="Begin a new CA; the old one stays trusted.")] = False,
    drop_old_ca: Annotated[bool, typer.Option("--drop-old-ca", help="Trust in the newest CA alone.")] = False,
    ca_days: CaDays = 3650,
) -> None:
    """Make new keys and certificates in DIR, for every role.

    Copy them to their hosts, in any order: processes that run there take them, and no request is lost. So it is with
    --ca, until --drop-old-ca ends the trust in the old CA: when every host has the new files. Both flags at once wait
    for nobody; that is for a CA whose key somebody else may have.
    """
    from kvferry.cli.certs_folder import next_trust, read_trust, renew
    from kvferry.common.credentials import CA_FILE

    with plain_errors("certs rotate"), alone(folder / CA_FILE):
        now = datetime.now(UTC)
        before = read_trust(folder, now)
        trust = next_trust(folder, before, now, timedelta(days=ca_days), new_ca, drop_old_ca)
        renew(folder, trust, now, timedelta(days=days))
    print(f"{folder} has new certificates, of the CA that is valid until {day(trust.issuing)}.")
    tell_where_files_go(folder)
    if before.issuing not in trust.roots:
        print("Who has certificates of the old CA is refused by who has the new files. Connections that are open stay "
              "open: start every process anew.")  # fmt: skip
    else:
        print("Running processes take the new files within seconds, and lose no request.")
    for old in trust.older:
        print(f"The old CA is trusted until {day(old)}; when every host has the new files, end that with "
              f"`kvferry certs rotate {folder} --drop-old-ca`.")  # fmt: skip


@app.command("show", epilog="Example: kvferry certs show /etc/kvferry/certs --json")
def show_certificates(folder: Folder, as_json: AsJson = False) -> None:
    """Show the certificates in DIR: whose they are, until when they are valid, and whether they can be used.

    Exit code 0 if all can be used, also those that end soon, within 14 days; 1 if one cannot.
    """
    with plain_errors("certs show"):
        rows = list(described(folder, datetime.now(UTC), whole=as_json))
    show(rows, as_json)
    if any(row["state"] not in ("valid", "soon") for row in rows):
        raise typer.Exit(EXIT_FAILED)


def tell_where_files_go(folder: Path) -> None:
    from kvferry.cli.certs_folder import CA_KEY
    from kvferry.common.certs import ROLES
    from kvferry.common.credentials import files_of

    print(f"{CA_KEY} stays there: who has it can be anybody. The hosts of each role need, for --certs:")
    for role in ROLES:
        print(f"  {role:<8} {' '.join(files_of(role))}")


def described(folder: Path, now: datetime, whole: bool) -> Iterator[dict[str, Any]]:
    """A row for each certificate that there is. `whole`: with all of its fingerprint. Its state is valid, soon (it ends
    within 14 days), expired, or why it cannot be used. Raises ConfigError."""
    from kvferry.common import certs
    from kvferry.common.credentials import CA_FILE, WARN, certificate_file, certificates_in, load, read
    from kvferry.common.errors import ConfigError

    issuing, *older = certificates_in(folder / CA_FILE, read(folder / CA_FILE))
    found = [("ca", CA_FILE, issuing), *(("old ca", CA_FILE, one) for one in older)]
    for role in certs.ROLES:
        if os.path.exists(path := folder / certificate_file(role)):
            found.append((role, path.name, certificates_in(path, read(path))[0]))
    for role, file, certificate in found:
        until = certificate.not_valid_after_utc
        state = "expired" if until <= now else "soon" if until - now < WARN else "valid"
        if role in certs.ROLES and until > now:
            try:
                load(folder, role, now)
            except ConfigError as error:
                state = str(error)
        yield {
            "role": role,
            "file": file,
            "subject": certs.name_of(certificate),
            "expires": until.isoformat().replace("+00:00", "Z"),
            "in": left(until - now),
            "fingerprint": certs.fingerprint(certificate)[: None if whole else 16],
            "state": state,
        }


def left(span: timedelta) -> str:
    """How long that is, for people."""
    hours = round(span / timedelta(hours=1))
    if hours < 0:
        return "-"
    return f"{round(hours / 24)} days" if hours >= 48 else f"{hours} hours"


def day(certificate: "Certificate") -> str:
    """The last on which it is valid."""
    return certificate.not_valid_after_utc.date().isoformat()
