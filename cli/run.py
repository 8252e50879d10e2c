"""Running one role as a process: signals, logs, and what the parent or the terminal is told when it fails."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

from kvferry.common.errors import ConfigError, IncompatibleNode, Internal, KvferryError
from kvferry.common.process import Notifier, take_descriptors
from kvferry.common.telemetry import json_line, logs_are_json

EXIT_FAILED = 1
EXIT_CONFIG = 2
ROLES = ("store", "prefill", "decode", "router")  # commands that are one process of a system each
LOGGING = ("serve", *ROLES)  # commands that run on, and write logs

Start = Callable[[Notifier, asyncio.Event], Awaitable[None]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The process that started this one, if one did that has to be told."""

    notifier: Notifier
    pid: int | None


@contextmanager
def plain_errors(command: str, notifier: Notifier | None = None) -> Iterator[None]:
    """Turn a KvferryError into an exit code and one sentence: for the parent, if it listens, else on stderr."""
    try:
        yield
    except KvferryError as error:
        if notifier is None or not notifier.failed(str(error)):
            tell_failure(command, str(error))
        wrong = isinstance(error, ConfigError | IncompatibleNode)
        raise typer.Exit(EXIT_CONFIG if wrong else EXIT_FAILED) from None


def tell_failure(command: str, sentence: str) -> None:
    """The last words of a command, on stderr: as its log is written, if it is one of those that have one. Keys in them
    are left out: what was mistyped is repeated, and it may be one."""
    from kvferry.router.tenants_file import without_keys

    sentence = without_keys(sentence)
    if command in LOGGING and logs_are_json():
        print(json_line(command, logging.ERROR, sentence), file=sys.stderr)
    else:
        print(f"{f'kvferry {command}'.strip()}: {sentence}", file=sys.stderr)


def run_role(role: str, parent: Parent, start: Start) -> None:
    """Run `start` until it returns, then end the process; SIGTERM and SIGINT set the event it is given. Raises
    KvferryError."""
    take_descriptors()
    try:
        asyncio.run(_until_stopped(parent.notifier, start))
    except KvferryError:
        raise
    except Exception as error:
        log.exception("%s ends: this is a bug", role)
        raise Internal(f"{role} met an error that it did not expect; its log has the cause") from error
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)  # all is closed; to take torch's modules apart would only keep who waits for our end waiting


async def _until_stopped(notifier: Notifier, start: Start) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await start(notifier, stop)
