"""Logs: lines for people on a terminal, JSON lines otherwise. No prompt, key or raw block name is ever logged."""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

from kvferry.common.config import ENVIRONMENT_PREFIX, LogConfig, environment

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the current task works for; tasks that it starts inherit it. Set where a request comes in: by the
guard around the router's routes, and where a worker opens a sequence or publishes one's blocks."""

NOISY = (
    "aiohttp.access",
    "asyncio",
    "grpc",
    "httpx",
    "httpx2",
    "transformers",
    "huggingface_hub",
    "filelock",
    "urllib3",
)


class JsonLines(logging.Formatter):
    """One object a record: time (UTC), level, role, logger, message; request_id and exception where there is one."""

    def __init__(self, role: str):
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """For people: time of day, role, level, message, and the request in brackets where there is one."""

    def __init__(self, role: str):
        super().__init__(f"%(asctime)s {role:<7} %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        request_id = REQUEST_ID.get()
        return super().formatMessage(record) + (f"  [{request_id}]" if request_id else "")


def json_line(role: str, level: int, message: str) -> str:
    """What is no log record, for who reads the log lines."""
    told = {"name": "kvferry", "levelno": level, "levelname": logging.getLevelName(level), "msg": message}
    return JsonLines(role).format(logging.makeLogRecord(told))


def logs_are_json() -> bool:
    """As it was set up; before that, as the environment says."""
    handlers = logging.getLogger().handlers
    if handlers:
        return isinstance(handlers[0].formatter, JsonLines)
    return not _is_text(environment().get(f"{ENVIRONMENT_PREFIX}LOG_FORMAT", "auto"))


def _is_text(log_format: str) -> bool:
    return log_format == "text" or (log_format != "json" and sys.stderr.isatty())


def setup_logging(role: str, config: LogConfig) -> None:
    """Send the root logger, and warnings, to stderr: once, at the start of a process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((TextLines if _is_text(config.log_format) else JsonLines)(role))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
