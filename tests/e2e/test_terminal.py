"""`kvferry serve` on a terminal, as a person meets it: the plan, bars, logs as text, the ready line, Ctrl-C."""

import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import pytest
from e2e.cluster import KVFERRY, START_S, STOP_S

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A command in a terminal of its own, 150 columns wide."""

    def __init__(self, *command: str):
        ours, theirs = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command], stdin=theirs, stdout=theirs, stderr=theirs, env=env
        )
        os.close(theirs)
        self.fd, self.shown = ours, ""

    def read_until(self, word: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while word not in self.shown:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {word!r} after {seconds} s; shown: {self.shown[-3000:]}"
            try:
                self.shown += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                raise AssertionError(f"no {word!r}; shown: {self.shown[-3000:]}") from None

    def end(self) -> int:
        """Read what is left; the exit code, within STOP_S."""
        deadline = time.monotonic() + STOP_S
        while True:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, "it does not end"
            try:
                self.shown += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:
                return self.process.wait(STOP_S)

    def press_ctrl_c(self) -> None:
        os.write(self.fd, b"\x03")

    def lines(self) -> list[str]:
        return [line.strip() for line in re.split(r"[\r\n]+", CONTROL.sub("", self.shown)) if line.strip()]


@pytest.fixture
def terminal(checkpoints: dict[str, Path]):
    started = []

    def start(*flags: str) -> Terminal:
        command = (*KVFERRY, "serve", str(checkpoints["llama"]), "--port=0", "--admin-port=0", "--store-size=64MiB",
                   "--num-gpu-blocks-override=96", "--threads=1", *flags)  # fmt: skip
        started.append(Terminal(*command))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        os.close(one.fd)


def test_a_start_and_its_end(terminal):
    shown = terminal()
    shown.read_until("model    llama", 10)
    assert "reading" not in shown.shown, "something was loaded before the plan was told"
    shown.read_until("kvferry is ready: http://127.0.0.1:", START_S)
    shown.press_ctrl_c()
    assert shown.end() == 0
    lines = shown.lines()
    for plan in ("model    llama:", "store    64MiB", "prefill  1:", "decode   1:", "router   http://127.0.0.1:"):
        assert sum(line.startswith(plan) for line in lines) == 1
    for name in ("prefill-0", "decode-0"):
        assert any(line.startswith(f"{name} reading the weights") and "━" in line for line in lines)
    logs = [line for line in lines if "node serves" in line]
    assert len(logs) == 2
    assert all(re.match(r"\d\d:\d\d:\d\d (prefill|decode ) INFO ", line) for line in logs), "not on lines of their own"
    assert not [line for line in lines if line.startswith("{") or "Traceback" in line]


def test_ctrl_c_during_the_start(terminal):
    shown = terminal()
    shown.read_until("store    64MiB", 10)
    shown.press_ctrl_c()
    assert shown.end() in (0, 130), "0 once children are there to be ended, 130 as of any interrupted command before"
    assert "Traceback" not in shown.shown
    assert "kvferry is ready" not in shown.shown
