"""`kvferry doctor`: looks at a cluster from one host, and says what is wrong and what to do about it."""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.flags import Flags
from kvferry.cli.layers import Settings
from kvferry.cli.run import EXIT_FAILED, Parent
from kvferry.cli.settings import SETTINGS
from kvferry.common.config import LogConfig, check_worker_address, silence_grpc, split_address
from kvferry.common.errors import ConfigError
from kvferry.common.telemetry import setup_logging

if TYPE_CHECKING:
    from datetime import datetime

    from kvferry.cli.diagnosis import Certificate, Finding, Seen
    from kvferry.common.credentials import Credentials

TAKEN = (
    "router.prefill", "router.decode", "router.store", "store.redis", "store.redis_user", "store.redis_password_file",
    "store.redis_ca_file", "store.peer_secret_file", "store.cluster",
)  # fmt: skip
FLAGS = Flags(
    ("router", "store", ""),
    without=tuple(path for path, one in SETTINGS.items() if one.section in ("router", "store") and path not in TAKEN),
)
EXTRA = MappingProxyType(
    {
        "router": Annotated[
            list[str] | None,
            typer.Option("--router", metavar="URL", help="The API of a router; may be repeated."),
        ],
        "peer": Annotated[
            list[str] | None,
            typer.Option("--peer", metavar="HOST:PORT", help="Where other stores reach a store; may be repeated."),
        ],
        "certs": Annotated[
            Path | None, typer.Option("--certs", metavar="DIR", help="Folder with ca.pem, doctor.pem and doctor.key.")
        ],
        "as_json": Annotated[bool | None, typer.Option("--json", help="Print JSON.")],
    }
)
STATES = {"ok": "green", "soon": "yellow", "wrong": "bold red"}


def doctor(
    settings: Settings,
    parent: Parent,
    router: Sequence[str] | None,
    peer: Sequence[str] | None,
    certs: Path | None,
    as_json: bool | None,
) -> None:
    """Look at a cluster from this host: whom it reaches, certificates, clocks, versions, whether prefill and decode fit
    together, Redis, and how fast the links between stores are.

    Looks at what it is given, by flags or by the same --config as the processes. Exit code 0 if all is well, 1 if
    something is wrong.
    """
    from kvferry.cli.diagnosis import findings

    silence_grpc()
    if not settings.values["log_level"].given:  # what is wrong, the table says
        setup_logging("doctor", LogConfig(log_level="WARNING", log_format=settings["log_format"]))
    found = findings(asyncio.run(examine(settings, router or (), list(peer or ()), certs or settings["router.certs"])))
    if not found:
        raise ConfigError("there is nothing to look at; give --router, --prefill, --decode, --store, --peer, "
                          "--redis or --certs")  # fmt: skip
    show(found, as_json)
    if any(one.state == "wrong" for one in found):
        raise typer.Exit(EXIT_FAILED)


async def examine(settings: Settings, routers: Sequence[str], peers: list[str], certs: Path | None) -> "Seen":
    """Raises ConfigError for what cannot be looked at as it is asked for."""
    from kvferry.cli import examination as look
    from kvferry.cli.diagnosis import Seen
    from kvferry.kvstore.network import read_secret
    from kvferry.kvstore.redis_target import parse_redis_url

    now, addresses = look.today(), [("prefill", one) for one in settings["router.prefill"]]
    addresses += [("decode", one) for one in settings["router.decode"] or ()]
    for _, address in addresses:
        check_worker_address(address, certs or Path())
    for url in routers:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is not where a router is; write it like http://10.0.0.1:8000")
    for address in peers:
        split_address(address, "--peer")
    shown, certificates = own_certificates(certs, now)
    me = None
    if (secret := settings["store.peer_secret_file"]) is not None:
        me = look.visitor(settings["store.cluster"], read_secret(secret))
    elif peers:
        raise ConfigError("a store speaks to nobody who does not know its secret; give --peer-secret-file")
    redis = []
    if settings["store.redis"] is not None:
        names = ("user", "password_file", "ca_file")
        redis = [parse_redis_url(settings["store.redis"], **{one: settings[f"store.redis_{one}"] for one in names})]
    sockets = [settings["router.store"]] if settings["router.store"] is not None else []

    without = look.WITHOUT_CERTIFICATES
    if certs is not None:
        without = f"of {certs} nothing can be shown to it; mend what is said of its files"
    workers = asyncio.gather(*(look.look_at_worker(role, address, shown, without) for role, address in addresses))
    local = await asyncio.gather(*(look.look_at_socket(socket) for socket in sockets))
    peers += [one.address for one in local if one.address and me is not None and one.address not in peers]
    stores = await asyncio.gather(*(look.look_at_store(address, me) for address in peers))
    there = [one.address for one in stores if not one.problem]
    return Seen(
        release=version("kvferry"),
        now=now,
        certificates=certificates,
        routers=await asyncio.gather(*(look.look_at_router(url.rstrip("/")) for url in routers)),
        workers=await workers,
        local=local,
        stores=stores,
        redis=await asyncio.gather(*(look.look_at_redis(target) for target in redis)),
        ways=await look.look_at_ways(there, me) if len(there) > 1 else (),
    )


def own_certificates(folder: Path | None, now: "datetime") -> "tuple[Credentials | None, list[Certificate]]":
    """What we show to workers, as a doctor or else as a router, and what there is to say of each file. Raises
    ConfigError."""
    from kvferry.cli.certs import described
    from kvferry.cli.diagnosis import Certificate
    from kvferry.common.credentials import certificate_file, load

    if folder is None:
        return None, []
    rows = list(described(folder, now, whole=False))
    roles = [role for role in ("doctor", "router") if (folder / certificate_file(role)).exists()]
    if not roles:
        raise ConfigError(f"there is no {folder / certificate_file('doctor')}, by which workers know a doctor; copy it "
                          "and doctor.key from the folder of `kvferry certs init`")  # fmt: skip
    told = [Certificate(file=f"{folder / row['file']}", role=row["role"], expires=parsed(row["expires"]),
                        state="valid" if row["state"] == "soon" else row["state"]) for row in rows]  # fmt: skip
    usable = next((role for role in roles if any(one.role == role and one.state == "valid" for one in told)), None)
    return load(folder, usable, now) if usable else None, told


def parsed(when: str) -> "datetime":
    from datetime import datetime

    return datetime.fromisoformat(when)


def show(found: "Sequence[Finding]", as_json: bool | None) -> None:
    if as_json:
        wrong = any(one.state == "wrong" for one in found)
        print(json.dumps({"ok": not wrong, "findings": [asdict(one) for one in found]}, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kvferry.cli.diagnosis import in_short

    table = Table("check", "of", "", "what was seen", "what to do", box=box.SIMPLE_HEAD, pad_edge=False)
    for one in found:
        table.add_row(one.check, one.of, Text(one.state, STATES[one.state]), one.told, one.do)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print(in_short(found))
