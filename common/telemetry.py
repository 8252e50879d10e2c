"""Logs: lines for people on a terminal, JSON lines otherwise. No prompt, key or raw block name is ever logged."""

import json
import logging
import sys
from datetime import UTC, datetime

from kvferry.common.errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class _JsonLines(logging.Formatter):
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
        if request_id := getattr(record, "request_id", None):
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def setup_logging(role: str, level: str = "INFO") -> None:
    """Send the root logger to stderr, once, at the start of a process. Raises ConfigError for an unknown level."""
    if level.upper() not in LEVELS:
        raise ConfigError(f"--log-level {level!r} is not known; use {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter(f"%(asctime)s {role:<7} %(levelname)-7s %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(_JsonLines(role))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "aiohttp.access", "transformers", "huggingface_hub", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
