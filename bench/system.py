"""A whole kvferry system under test: started as a person would, asked over HTTP, stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

KVFERRY = Path(sys.executable).parent / "kvferry"
STOP_S = 10.0


@dataclass(frozen=True)
class System:
    """A running `kvferry serve`. `model` is the name it serves."""

    url: str
    model: str
    pid: int

    def argument(self, role: str, flag: str) -> str:
        """What a child process of this role was given for `--flag`."""
        for child in psutil.Process(self.pid).children():
            command = child.cmdline()
            if role in command:
                return next(word.split("=", 1)[1] for word in command if word.startswith(f"--{flag}="))
        raise LookupError(f"no {role} process")


@dataclass(frozen=True)
class Timed:
    """One streamed answer. `moments`: seconds from sending the request to each token's arrival."""

    moments: list[float]
    usage: dict[str, Any]

    @property
    def ttft(self) -> float:
        return self.moments[0]

    @property
    def gaps(self) -> list[float]:
        return [late - early for early, late in zip(self.moments, self.moments[1:], strict=False)]


@contextmanager
def system(model: str, *flags: str) -> Iterator[System]:
    command = [KVFERRY, "serve", model, "--port=0", "--admin-port=0", "--log-level=WARNING"]
    command += [f"--parent-pid={os.getpid()}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    try:
        ready = process.stdout.readline()
        if "http://" not in ready:
            sys.exit(f"kvferry did not start: {' '.join(map(str, command))}")
        url = "http://" + ready.split("http://")[1].split("/v1")[0]
        yield System(url, ready.split("model ")[1].split()[0], process.pid)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(STOP_S)


def ask(http: httpx.Client, to: System, prompt: list[int], max_tokens: int) -> Timed:
    """A greedy streamed completion of token ids; exits with what the server said if it fails."""
    body = {
        "model": to.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    moments, usage = [], {}
    started = time.perf_counter()
    with http.stream("POST", f"{to.url}/v1/completions", json=body, timeout=300) as response:
        if response.status_code != 200:
            sys.exit(f"the server answered {response.status_code}: {response.read().decode()[:300]}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                sys.exit(f"the server broke off: {chunk['error']['message']}")
            usage = chunk.get("usage") or usage
            if any(choice.get("token_ids") for choice in chunk["choices"]):
                moments.append(time.perf_counter() - started)
    return Timed(moments, usage)
