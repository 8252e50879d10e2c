"""Named places where a test may make a process stop, die or wait. Inert unless a flag arms them.

A spec is `name=action`, with action `stop` (SIGSTOP to itself), `kill` (SIGKILL to itself) or `sleep:SECONDS`;
`name=action@N` acts on the N-th hit only.
"""

import asyncio
import os
import signal
from collections import Counter

from kvferry.common.errors import ConfigError


class Failpoints:
    def __init__(self, specs: tuple[str, ...] = ()):
        self._armed: dict[str, tuple[str, int | None]] = {}
        self._hits: Counter[str] = Counter()
        for spec in specs:
            name, _, rest = spec.partition("=")
            action, _, nth = rest.partition("@")
            kind, _, seconds = action.partition(":")
            known = kind in ("stop", "kill") or (kind == "sleep" and seconds.replace(".", "", 1).isdecimal())
            if not known or (nth and not nth.isdecimal()):
                raise ConfigError(f"failpoint {spec!r} is not NAME=stop|kill|sleep:SECONDS with an optional @N")
            self._armed[name] = (action, int(nth) if nth else None)

    async def hit(self, name: str) -> None:
        """Pass a named place."""
        if name not in self._armed:
            return
        action, nth = self._armed[name]
        self._hits[name] += 1
        if nth is not None and self._hits[name] != nth:
            return
        if action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            await asyncio.sleep(float(action.partition(":")[2]))
