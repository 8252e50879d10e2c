"""Running one role as a process: signals, logs, and what the parent and the terminal are told when it fails."""

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

from kvferry.common.errors import ConfigError, KvferryError
from kvferry.common.process import Notifier, die_with_parent
from kvferry.common.telemetry import setup_logging

EXIT_FAILED = 1
EXIT_CONFIG = 2

Start = Callable[[Notifier, asyncio.Event], Awaitable[None]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """What the process that started this one says of itself."""

    notify_fd: int | None
    parent_pid: int | None
    log_level: str = "INFO"


@contextmanager
def plain_errors(command: str) -> Iterator[None]:
    """Turn a KvferryError into one sentence on stderr and an exit code."""
    try:
        yield
    except KvferryError as error:
        print(f"kvferry {command}: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED) from None


def run_role(role: str, options: ProcessOptions, start: Start) -> None:
    """Run `start` until it returns; SIGTERM and SIGINT set the event it is given.

    `start` imports what it needs, builds its configuration and serves. When it raises, the parent gets a sentence over
    the notify pipe and the process ends: with 2 for a ConfigError, with 1 otherwise.
    """
    notifier = Notifier(options.notify_fd)
    with plain_errors(role):
        try:
            setup_logging(role, options.log_level)
            if options.parent_pid is not None:
                die_with_parent(options.parent_pid)
            asyncio.run(_until_stopped(notifier, start))
        except KvferryError as error:
            notifier.failed(str(error))
            raise
        except Exception:
            log.exception("%s ends: this is a bug", role)
            notifier.failed(f"{role} met an error that it did not expect; its log has the cause")
            raise typer.Exit(EXIT_FAILED) from None


async def _until_stopped(notifier: Notifier, start: Start) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await start(notifier, stop)
