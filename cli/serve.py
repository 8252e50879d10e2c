"""`kvferry serve MODEL`: a whole system on one host, every part its own process."""

import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from kvferry.cli import checks
from kvferry.cli.checks import open_port
from kvferry.cli.flags import Flags
from kvferry.cli.layers import Settings
from kvferry.cli.models import Found, Progress, find
from kvferry.cli.plan import Plan, lines, make_plan, ready_line, stages, understood_plan, with_model
from kvferry.cli.progress import Bars, Lines, display
from kvferry.cli.run import Parent
from kvferry.cli.supervisor import ChildSpec, Supervisor
from kvferry.common.clock import MonotonicClock
from kvferry.common.errors import ConfigError
from kvferry.common.process import Note, usable_cores
from kvferry.common.telemetry import json_line, logs_are_json

SAME_SIGNAL_S = 0.3  # a process and its group are often both told; that is one wish
FLAGS = Flags(
    ("serve", "engine", "store", "router", "router.limits", ""),
    argument="engine.model",
    without=("store.socket", "router.model", "router.revision", "router.prefill", "router.decode", "router.store",
             "router.certs", "router.drain_seconds"),
    renamed={f"store.{name}": f"--store-{name}" for name in ("size", "listen", "advertise", "connections")},
)  # fmt: skip


def serve(settings: Settings, parent: Parent) -> None:
    """Run a whole system on this host: store, prefill and decode workers, and the router."""
    checks.check_values(settings)
    with closing(display(settings.of(""))) as shown, private_folder() as folder:
        plan = make_plan(settings, folder, usable_cores())
        found = look(plan, lambda step, done, total: shown.show("serve", Note(step, done, total)))
        shown.show("serve", Note())
        plan = with_ports(with_model(plan, found))
        if shown.tell:  # children write to a pipe, and a terminal shows it
            plan = replace(plan, logs=replace(plan.logs, log_format="text"))
        shown.plan(lines(understood_plan(plan), found.weight_bytes(plan.engines[0].dtype)))
        command = (sys.executable, os.path.abspath(sys.argv[0]))
        asyncio.run(_serve(stages(plan, command), plan, shown))


def look(plan: Plan, progress: Progress, fetch_weights: bool = True) -> Found:
    """Look at everything that can be wrong before anything is started: at what the children will make of what they are
    told, at this host and at the model, which is fetched if need be. Raises ConfigError."""
    from kvferry.kvstore.node import refuse_if_too_large

    plan = understood_plan(plan)
    checks.check_router(plan.router)
    for worker in plan.workers:
        checks.check_certs(worker.certs, worker.role)
    model, revision = plan.engines[0].model, plan.engines[0].revision
    found = find(model, revision, progress, fetch_weights)
    for engine in plan.engines:
        checks.check_model(found, engine)
    checks.check_text_side(found.folder, plan.router.generation_config)
    checks.check_memory(found, plan.engines, plan.store.size_bytes)
    refuse_if_too_large(plan.store)
    checks.check_store(plan.store)
    return found


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for this user alone with a short path (that of a unix socket has 107 bytes at most), gone afterwards."""
    of_user = Path(f"/run/user/{os.getuid()}")
    parent = of_user if os.access(of_user, os.W_OK | os.X_OK) else Path("/tmp")
    folder = Path(tempfile.mkdtemp(prefix="kvferry-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def with_ports(plan: Plan) -> Plan:
    """The plan with the ports that its router will listen at, free ones where it says 0, which the ready line has to
    name. Raises ConfigError."""
    told = understood_plan(plan).router
    port = open_port(told.host, told.port, "--port")
    admin_port = open_port(told.admin_host, told.admin_port, "--admin-port")
    plan = replace(plan, router=replace(plan.router, port=port, admin_port=admin_port))
    if 0 in ((router := understood_plan(plan).router).port, router.admin_port):
        raise ConfigError("--router-arg: a port 0 there would not be known here; give --port=0 or --admin-port=0 to "
                          "serve itself")  # fmt: skip
    return plan


async def _serve(processes: Sequence[Sequence[ChildSpec]], plan: Plan, shown: Bars | Lines) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    first_at = 0.0

    def on_signal() -> None:
        nonlocal first_at
        if not stop.is_set():
            first_at = loop.time()
            stop.set()
        elif loop.time() - first_at > SAME_SIGNAL_S:
            hurry.set()

    def on_ready() -> None:
        shown.close()
        line = ready_line(understood_plan(plan))
        print(json_line("serve", logging.INFO, line) if logs_are_json() else line, flush=True)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    await Supervisor(processes, shown.show, MonotonicClock(), shown.tell).run(stop, hurry, on_ready)
