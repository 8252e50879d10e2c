"""What a log line says, and for whom it is written."""

import asyncio
import io
import json
import logging
import sys
import warnings

import pytest

from kvferry.common.config import LogConfig
from kvferry.common.errors import ConfigError
from kvferry.common.telemetry import REQUEST_ID, setup_logging

log = logging.getLogger("a.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stderr(monkeypatch):
    """What `setup_logging` writes to, given a stream for stderr; the root logger is put back afterwards."""
    root = logging.getLogger()
    before = (root.level, root.handlers[:])

    def setup(stream, **config: str):
        monkeypatch.setattr(sys, "stderr", stream)
        setup_logging("decode", LogConfig(**config))
        return stream

    yield setup
    logging.captureWarnings(False)
    root.level, root.handlers[:] = before


def test_json_lines(stderr):
    stream = stderr(io.StringIO())
    log.info("%d blocks", 3)
    (line,) = stream.getvalue().splitlines()
    told = json.loads(line)
    assert told.pop("time").endswith("+00:00")
    assert told == {"level": "info", "role": "decode", "logger": "a.test", "message": "3 blocks"}


def test_an_exception_is_part_of_its_line(stderr):
    stream = stderr(io.StringIO())
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("it failed")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: no")


@pytest.mark.parametrize(
    ("stream", "log_format", "is_json"),
    [(Terminal, "auto", False), (io.StringIO, "auto", True), (Terminal, "json", True), (io.StringIO, "text", False)],
)
def test_for_whom(stderr, stream, log_format, is_json):
    written = stderr(stream(), log_format=log_format)
    log.warning("beware")
    line = written.getvalue()
    assert line.startswith("{") == is_json
    assert "beware" in line
    assert "decode" in line


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_the_request_is_that_of_the_task(stderr, log_format):
    stream = stderr(io.StringIO(), log_format=log_format)

    async def request(name: str) -> None:
        REQUEST_ID.set(name)
        await asyncio.sleep(0)
        log.info("own of %s", name)
        await asyncio.create_task(below(name))

    async def below(name: str) -> None:
        log.info("below of %s", name)

    async def both() -> None:
        await asyncio.gather(*(asyncio.create_task(request(name)) for name in ("r-1", "r-2")))
        log.info("of none")

    asyncio.run(both())
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    for line in lines:
        name = next((name for name in ("r-1", "r-2") if f"of {name}" in line), None)
        if log_format == "json":
            assert json.loads(line).get("request_id") == name
        else:
            assert line.endswith(f"[{name}]" if name else "of none")


def test_levels(stderr):
    stream = stderr(io.StringIO(), log_level="warning")
    log.info("quiet")
    log.warning("loud")
    logging.getLogger("httpx").info("never")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_warnings_are_lines_too(stderr):
    stream = stderr(io.StringIO())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", stacklevel=1)
    assert json.loads(stream.getvalue())["logger"] == "py.warnings"


@pytest.mark.parametrize("wrong", [{"log_level": "LOUD"}, {"log_format": "xml"}, {"log_level": ""}])
def test_what_is_not_known(wrong):
    with pytest.raises(ConfigError, match=r"is .*; use "):
        LogConfig(**wrong)
