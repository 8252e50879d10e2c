"""A whole kvferry as its users run it: `kvferry serve` and the process tree under it, asked over HTTP."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from checkpoints import PRINTABLE

KVFERRY = (str(Path(sys.executable).parent / "kvferry"),)
START_S = 60.0
STOP_S = 5.0
ANSWER_S = 60.0
MAX_TOKENS = 24
BLOCK = 16
POOL_BLOCKS = 96
LOCAL = 24  # up to so many uncached tokens are computed by decode itself
T = TypeVar("T")


def until(found: Callable[[], T], seconds: float, what: str) -> T:
    """The first true value of `found()`; AssertionError when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        if value := found():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:g} s: not {what}; last: {value!r}")
        time.sleep(0.01)


class Prompts:
    """Random prompts, new ones at every call. The seed is printed; a failing test shows it."""

    def __init__(self, name: str):
        self.seed = zlib.crc32(name.encode())
        print(f"prompts of {name}: seed {self.seed}")
        self._random = random.Random(self.seed)

    def tokens(self, length: int) -> list[int]:
        return self._random.choices(PRINTABLE, k=length)

    def text(self, length: int) -> str:
        return bytes(self.tokens(length)).decode()


@dataclass
class Reply:
    """What came back: of a whole answer, or gathered from a stream."""

    status: int
    body: dict[str, Any] = field(default_factory=dict)
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def cached(self) -> int:
        return self.usage["prompt_tokens_details"]["cached_tokens"]

    @property
    def account(self) -> dict[str, Any]:
        return self.usage["kvferry"]

    @property
    def computed(self) -> int:
        return sum(self.account["computed"].values())

    @property
    def error(self) -> dict[str, Any]:
        return self.body["error"]

    def take(self, body: dict[str, Any]) -> None:
        """A whole body, or one more chunk."""
        self.usage = body.get("usage") or self.usage
        self.prompt_token_ids = body.get("prompt_token_ids") or self.prompt_token_ids
        for choice in body.get("choices", ()):
            self.prompt_token_ids = choice.get("prompt_token_ids") or self.prompt_token_ids
            said = choice.get("message") or choice.get("delta") or choice
            self.text += said.get("text") or said.get("content") or ""
            self.token_ids += choice.get("token_ids") or []
            self.finish_reason = choice["finish_reason"] or self.finish_reason


class Stream:
    """An open stream of events; iterating gives each chunk and gathers it in `reply`."""

    def __init__(self, response: httpx.Response):
        self.reply = Reply(response.status_code)
        self.finished = False
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._lines:
            if line == "data: [DONE]":
                self.finished = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.reply.body = chunk
                self.reply.take(chunk)
                yield chunk

    def read_tokens(self, count: int) -> None:
        """Read on until so many tokens have come, or the end."""
        for _ in self:
            if len(self.reply.token_ids) >= count:
                return

    def rest(self) -> Reply:
        for _ in self:
            pass
        return self.reply


def shared_memory() -> set[str]:
    """What lies in /dev/shm, but for locks, which other programs of this machine make and drop all the time."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("sem.", "pym-"))}


class Cluster:
    """One `kvferry serve`. `flags` are its own; `command` is what is run instead of the console script."""

    def __init__(self, model: Path, log: Path, *flags: str, command: Sequence[str] = KVFERRY, env: dict | None = None):
        self.model, self.log = model, log
        self.port, self.admin_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=ANSWER_S, limits=httpx.Limits(max_keepalive_connections=0))
        self._command = [
            *command, "serve", str(model), f"--port={self.port}", f"--admin-port={self.admin_port}",
            "--store-size=64MiB", "--dtype=float32", "--threads=1", "--max-num-batched-tokens=64",
            f"--num-gpu-blocks-override={POOL_BLOCKS}", f"--max-local-prefill-length={LOCAL}", *flags,
        ]  # fmt: skip
        self._env = {**os.environ, **(env or {}), "TERM": "dumb", "NO_COLOR": "1"}
        self._seen: dict[int, psutil.Process] = {}
        self.key = ""  # of the tenant whose requests these are, unless a test says otherwise

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> "Cluster":
        self._shm = shared_memory()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._env, start_new_session=True
            )
        self.serve = psutil.Process(self.process.pid)
        try:
            until(self._started, START_S, "ready")
            assert self.ready(), "it said that it was"
            until(lambda: all(node["ready"] for node in self.nodes()["nodes"]), START_S, "every worker there")
        except BaseException:
            self.kill()
            raise
        self.folder = Path(self._flag("store", "--socket")).parent
        return self

    def _started(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"kvferry serve ended with {self.process.returncode}: {self.tail(2000)}")
        return "kvferry is ready" in self.tail(100000)

    def ready(self) -> bool:
        try:
            return self.http.get("/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """As Ctrl-C does. Asserts that within 5 s nothing is left: no process, no file, no shared memory."""
        self.http.close()
        family = self.family()
        before = time.monotonic()
        self.process.send_signal(number)
        try:
            code = self.process.wait(STOP_S)
            _, alive = psutil.wait_procs(family, STOP_S - (time.monotonic() - before))
        except BaseException:
            self.kill()
            raise
        assert not alive, f"still there after {STOP_S} s: {alive}"
        assert code == 0, f"kvferry serve ended with {code}"
        assert not self.folder.exists()
        assert shared_memory() <= self._shm

    def kill(self) -> None:
        """End everything at once, whatever its state."""
        for process in [*self.family(), self.serve]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def family(self) -> list[psutil.Process]:
        """Every process that was ever seen under `serve`, and is there."""
        with suppress(psutil.NoSuchProcess):
            self._seen |= {child.pid: child for child in self.serve.children(recursive=True)}
        return [process for process in self._seen.values() if process.is_running()]

    def tail(self, size: int = 6000) -> str:
        return self.log.read_bytes()[-size:].decode(errors="replace")

    # -- its processes -------------------------------------------------------------------------------------------

    def of_role(self, role: str, number: int = 0) -> psutil.Process:
        """The process of a role now. AssertionError when there is none."""
        at = f"{role}-{number}"
        for process in self.family():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if role in line and (role in ("store", "router") or any(arg.endswith(at) for arg in line)):
                return process
        raise AssertionError(f"there is no {at}")

    def _flag(self, role: str, name: str) -> str:
        return next(arg.partition("=")[2] for arg in self.of_role(role).cmdline() if arg.startswith(f"{name}="))

    # -- what the operator sees ----------------------------------------------------------------------------------

    def admin(self, path: str) -> httpx.Response:
        response = httpx.get(f"http://127.0.0.1:{self.admin_port}{path}", timeout=10)
        response.raise_for_status()
        return response

    def nodes(self) -> dict[str, Any]:
        return self.admin("/nodes").json()

    def node(self, role: str, number: int = 0) -> dict[str, Any]:
        told = [node for node in self.nodes()["nodes"] if node["role"] == role]
        return told[number]

    def store(self) -> dict[str, Any]:
        return self.nodes()["store"]

    def busy(self) -> dict[str, Any]:
        """What is under way anywhere, as far as the workers have told; empty when nothing is."""
        told = self.nodes()
        held = {name: told["store"][name] for name in ("leases", "writing", "reserved")}
        work = {node["address"]: {name: node.get(name, "?") for name in ("streams", "running", "waiting")}
                for node in told["nodes"]} | {"store": held}  # fmt: skip
        return {who: what for who, what in work.items() if any(what.values())}

    def settle(self) -> None:
        until(lambda: all(node["ready"] for node in self.nodes()["nodes"]), START_S, "every worker there")
        deadline = time.monotonic() + 5
        while busy := self.busy():
            assert time.monotonic() < deadline, f"not idle: {busy}"
            time.sleep(0.01)

    def flush(self, prompts: Prompts) -> None:
        """Push every name out of the workers' page pools; what is found from here on comes from the store."""
        roles = [node["role"] for node in self.nodes()["nodes"]]
        workers = max(roles.count("prefill"), roles.count("decode"))
        for _ in range(2):
            self.settle()
            half = [prompts.tokens(POOL_BLOCKS * BLOCK // 2) for _ in range(workers)]  # at once: one for each
            self.together([partial(self.ask, prompt, max_tokens=2) for prompt in half])

    # -- asking --------------------------------------------------------------------------------------------------

    def body(self, prompt: Sequence[int] | str, **fields: Any) -> dict[str, Any]:
        """A greedy request for exactly MAX_TOKENS tokens unless `fields` say otherwise."""
        body = {
            "model": self.model.name, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, **fields,
        }  # fmt: skip
        if body.get("stream"):
            body.setdefault("stream_options", {"include_usage": True})
        return body

    def ask(self, prompt: Sequence[int] | str, *, key: str = "", **fields: Any) -> Reply:
        """One completion. Fails the test unless it is answered with 200."""
        reply = self.post("/v1/completions", self.body(prompt, **fields), key)
        assert reply.status == 200, reply.body
        return reply

    def chat(self, messages: list[dict[str, str]], *, key: str = "", **fields: Any) -> Reply:
        body = self.body("", **fields)
        del body["prompt"]
        reply = self.post("/v1/chat/completions", {**body, "messages": messages}, key)
        assert reply.status == 200, reply.body
        return reply

    def post(self, path: str, body: dict[str, Any], key: str = "") -> Reply:
        if body.get("stream"):
            with self.stream(path, body, key) as stream:
                reply = stream.rest()
                assert stream.finished or "error" in reply.body or reply.status != 200, "the stream broke off"
                return reply
        response = self.http.post(path, json=body, headers=credential(key or self.key))
        reply = Reply(response.status_code, response.json())
        reply.take(reply.body)
        return reply

    @contextmanager
    def stream(self, path: str, body: dict[str, Any], key: str = "") -> Iterator[Stream]:
        with self.http.stream("POST", path, json=body, headers=credential(key or self.key)) as response:
            yield Stream(response)

    @contextmanager
    def open(self, prompt: Sequence[int], **fields: Any) -> Iterator[Stream]:
        """A completion that is being streamed."""
        with self.stream("/v1/completions", self.body(prompt, stream=True, **fields)) as stream:
            yield stream

    def together(self, asks: Sequence[Callable[[], T]]) -> list[T]:
        """Run all at the same time, each in a thread."""
        with ThreadPoolExecutor(len(asks)) as threads:
            return [job.result() for job in [threads.submit(ask) for ask in asks]]


def credential(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
