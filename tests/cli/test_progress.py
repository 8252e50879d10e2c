"""What a start tells where no terminal shows bars."""

import json
import logging
import re
import signal
import subprocess
import time
from datetime import datetime
from itertools import pairwise

import pytest
from command_line import KVFERRY

from kvferry.cli import progress
from kvferry.cli.progress import SILENT_MOST_S, SILENT_S, Lines
from kvferry.common.clock import ManualClock
from kvferry.common.process import Note


@pytest.fixture
def lines(caplog, monkeypatch):
    """`lines.told()`: what was told since it was last asked for. Nobody but the test looks at the clock."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 1e6)
    shown = Lines(clock := ManualClock())

    def told() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    shown.told, shown.clock = told, clock
    yield shown
    shown.close()


def test_each_step_is_told_once_in_plain_words(lines):
    for done in range(3):
        lines.show("prefill-0", Note("weights", done, 3))
    lines.show("prefill-0", Note("check", 0, 1))
    lines.show("store", Note("prefault", 5, 9))
    lines.show("store", Note(ready=True))
    assert lines.told() == [
        "prefill-0: reading the weights",
        "prefill-0: checking the model; a machine's first start compiles kernels here",
        "store: taking memory for the store",
        "store: ready",
    ]


def test_a_long_silence_is_broken_by_who_is_doing_what(lines):
    lines.show("prefill-0", Note("weights", 0, 8))
    lines.clock.advance(1)
    lines.show("decode-0", Note("import"))
    lines.told()
    lines.clock.advance(SILENT_S - 0.01)
    lines.remind()
    assert lines.told() == []
    lines.show("prefill-0", Note("weights", 6, 8))
    lines.clock.advance(0.01)
    lines.remind()
    lines.remind()
    assert lines.told() == [
        "not ready yet: prefill-0 reading the weights, 75% (4 s); decode-0 loading its libraries (3 s)"
    ]
    lines.clock.advance(SILENT_S)
    lines.show("prefill-0", Note(ready=True))
    lines.remind()
    assert lines.told() == ["prefill-0: ready"], "it was not silent"
    lines.clock.advance(SILENT_S)
    lines.remind()
    assert lines.told() == ["not ready yet: decode-0 loading its libraries (9 s)"]
    lines.show("decode-0", Note(failed="the moon is full"))
    lines.clock.advance(100)
    lines.remind()
    assert lines.told() == [], "nobody is starting"


def test_a_start_that_takes_very_long_is_told_of_less_often(lines):
    lines.show("router", Note("wait"))
    lines.told()
    count = 0
    for _ in range(36000):
        lines.clock.advance(0.1)
        lines.remind()
        count += len(lines.told())
    assert 60 <= count <= 120, "of an hour, about one a minute"
    lines.clock.advance(SILENT_MOST_S)
    lines.remind()
    assert len(lines.told()) == 1


def test_what_is_often_short_is_told_of_only_when_it_is_not(lines):
    lines.show("serve", Note("fetch"))
    lines.show("serve", Note())
    lines.clock.advance(SILENT_S)
    lines.remind()
    assert lines.told() == []
    lines.show("serve", Note("fetch"))
    lines.clock.advance(SILENT_S)
    lines.remind()
    assert lines.told() == ["not ready yet: serve fetching the model from the hub (3 s)"]


def test_a_restart_is_told_as_the_start_was(lines):
    for _ in range(2):
        lines.show("store", Note("prefault", 1, 2))
        lines.show("store", Note(ready=True))
        assert lines.told() == ["store: taking memory for the store", "store: ready"]


def test_a_process_that_runs_alone_tells_its_own_start(tmp_path):
    """Nobody waits for it; and it must not be silent for longer than a few seconds, whatever it does."""
    command = [KVFERRY, "router", "--decode=unix:/nowhere/d", f"--store={tmp_path}/s", "--port=0", "--admin-port=0",
               "--log-format=json"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines, deadline = [], time.monotonic() + 60
            while not lines or not re.search("waiting for the workers .[2-9] s", lines[-1]["message"]):
                assert time.monotonic() < deadline
                lines.append(json.loads(process.stderr.readline()))
        finally:
            process.send_signal(signal.SIGTERM)
    messages = [line["message"] for line in lines]
    assert messages.index("loading its libraries") < messages.index("waiting for the workers")
    times = [datetime.fromisoformat(line["time"]).timestamp() for line in lines]
    gaps = [late - early for early, late in pairwise(times)]
    assert max(gaps) < 2 * SILENT_S, messages
