"""A worker whose --store names a socket that is not there: its log and the doctor say so, until it is there."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from command_line import KVFERRY, kvferry
from e2e.cluster import until


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="kvf-"))  # a unix path is short
    yield path
    shutil.rmtree(path)


def wrong(folder: Path) -> list[tuple[str, str]]:
    found = json.loads(kvferry("doctor", f"--prefill=unix:{folder}/p", "--json").stdout)["findings"]
    return [(one["check"], one["told"]) for one in found if one["state"] == "wrong"]


def test_it_is_seen_until_the_store_is_there(folder):
    model, log = tiny_checkpoint(folder / "m", "llama", 0, True), folder / "log"
    command = [KVFERRY, "prefill", str(model), f"--listen=unix:{folder}/p", f"--store={folder}/s", "--device=cpu"]
    with open(log, "wb") as out:
        env = {**os.environ, "KVFERRY_LOG_FORMAT": "json"}
        processes = [subprocess.Popen(command, stdout=out, stderr=out, env=env)]
    try:
        until(lambda: "node serves" in log.read_text() or processes[0].poll() is not None, 60, "worker there")
        print(log.read_text()[-2000:])
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        (warning,) = [line for line in lines if line["level"] == "warning"]
        assert warning["message"].startswith("the store is not there yet, and nothing is found or kept until it is: ")
        assert wrong(folder) == [("store", "it has no store: no block comes to it or from it")]
        processes.append(subprocess.Popen([KVFERRY, "store", f"--socket={folder}/s", "--size=16MiB"]))
        until(lambda: wrong(folder) == [], 30, "store found")
    finally:
        for process in processes:
            process.kill()
            process.wait()
