"""`kvferry demo`: start a whole system, talk to it as two tenants, show what was computed and what was reused."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from kvferry.cli.run import plain_errors
from kvferry.common.errors import ConfigError, Internal

STOP_S = 10.0
ANSWER_TOKENS = 32
BRIEFING = (
    "You are the harbour master's clerk. Ferries leave the north pier at six, nine and noon, and the south pier at "
    "seven, ten and one. A crossing takes forty minutes in fair weather and an hour in a swell. Cars board first, then "
    "bicycles, then people on foot. Dogs travel free on a lead. Tickets are sold on the pier and on board; a return "
    "ticket is good for seven days. When the wind is above force eight nothing sails, and tickets are given back. "
) * 3

LONG_QUESTION = (
    "We are a party of nine with two cars, four bicycles and a dog, and we would like to cross in the morning and come "
    "back on the same day. Which ferries should we take, and which tickets should we buy?"
)


@dataclass(frozen=True)
class Ask:
    """One request of the script. `follows`: the next turn of the tenant's conversation, not a new one."""

    what: str
    tenant: str
    question: str
    follows: bool = False
    salt: str = ""


SCRIPT = (
    Ask("a first question", "alice", "When does the first ferry leave the north pier?"),
    Ask("the same again", "alice", "When does the first ferry leave the north pier?"),
    Ask("the next turn", "alice", "And how long does it take in a swell?", follows=True),
    Ask("a turn after a long question", "alice", LONG_QUESTION, follows=True),
    Ask("same briefing, other question", "alice", "May I bring my dog?"),
    Ask("another tenant, first question", "bob", "When does the first ferry leave the north pier?"),
    Ask("the same again", "bob", "When does the first ferry leave the north pier?"),
    Ask("a cache_salt of its own", "alice", "When does the first ferry leave the north pier?", salt="private"),
)


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]
    ttft_s: float
    gaps_s: list[float]
    usage: dict[str, Any]


def demo(model: Annotated[str, typer.Option(help="demo, a folder, or a Hugging Face id.")] = "demo") -> None:
    """Start everything, run a short conversation as two tenants, print what came from where, stop everything."""
    with plain_errors("demo"), TemporaryDirectory(prefix="kvferry-demo-") as folder:
        tenants_file = Path(folder) / "tenants.toml"
        keys = {name: make_key(tenants_file, name) for name in ("alice", "bob")}
        with served(model, tenants_file) as url:
            rows = asyncio.run(converse(url, keys))
        show(model, rows)


def make_key(tenants_file: Path, tenant: str) -> str:
    from kvferry.router.tenants_file import new_file, read_file, with_key, write_file

    file = read_file(tenants_file) if tenants_file.exists() else new_file()
    file, key = with_key(file, tenant)
    write_file(tenants_file, file)
    return key


@contextmanager
def served(model: str, tenants_file: Path) -> Iterator[str]:
    """`kvferry serve` as its own process tree; yields its URL, and stops it as Ctrl-C would."""
    command = [sys.executable, os.path.abspath(sys.argv[0]), "serve", model, f"--tenants-file={tenants_file}"]
    command += ["--port=0", "--admin-port=0", f"--parent-pid={os.getpid()}"]
    # On a terminal bars show that it starts; elsewhere lines do, and then those of requests.
    command += ["--log-level=WARNING"] if sys.stderr.isatty() else ["--log-level=INFO", "--log-format=text"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    try:
        ready = process.stdout.readline()
        if "http://" not in ready:
            raise ConfigError(f"the system did not start (exit code {process.wait()}); what it said is above")
        print(ready, end="", flush=True)
        yield "http://" + ready.split("http://")[1].split("/v1")[0]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Internal(f"the system did not stop within {STOP_S:g} s") from None


async def converse(url: str, keys: dict[str, str]) -> list[tuple[Ask, Answer, bool]]:
    """Run the script; each request once as it is and once under a cache_salt that was never used, so that nothing can
    be reused. The third value says whether both gave the same tokens."""
    import aiohttp
    from rich.console import Console

    console, rows = Console(stderr=True), []
    histories: dict[str, list[dict[str, str]]] = {}
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=300)) as http:
        model = await only_model(http, keys["alice"])
        chat = await has_chat(http, keys["alice"], model)
        with console.status("talking") as status:
            for number, ask in enumerate(SCRIPT, 1):
                status.update(f"talking: {ask.tenant}, {ask.what}")
                begun = histories[ask.tenant] if ask.follows else [{"role": "system", "content": BRIEFING}]
                messages = [*begun, {"role": "user", "content": ask.question}]
                answer = await say(http, keys[ask.tenant], model, chat, messages, ask.salt)
                histories[ask.tenant] = [*messages, {"role": "assistant", "content": answer.text}]
                plain = await say(http, keys[ask.tenant], model, chat, messages, f"never-{number}-{uuid.uuid4().hex}")
                if plain.usage["prompt_tokens_details"]["cached_tokens"]:
                    raise Internal("a request under a fresh cache_salt reused something")
                rows.append((ask, answer, plain.token_ids == answer.token_ids))
    return rows


async def only_model(http: Any, key: str) -> str:
    async with http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
        response.raise_for_status()
        return (await response.json())["data"][0]["id"]


async def has_chat(http: Any, key: str, model: str) -> bool:
    """Whether the model brings a chat template; a base model is given the conversation as plain text."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    async with http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}) as response:
        told = await response.json()
        if response.status == 400 and told["error"]["param"] == "messages":
            return False
        if response.status != 200:
            raise Internal(f"the server answered {response.status}: {told['error']['message']}")
        return True


async def say(http: Any, key: str, model: str, chat: bool, messages: list[dict[str, str]], salt: str) -> Answer:
    """One streamed greedy request. Raises Internal with what the server said if it fails."""
    text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages) + "\nassistant:"
    body = {
        "model": model,
        **({"messages": messages} if chat else {"prompt": text}),
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "cache_salt": salt,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "ignore_eos": True,
    }
    started = time.perf_counter()
    moments, parts, token_ids, usage = [], [], [], {}
    route = "/v1/chat/completions" if chat else "/v1/completions"
    async with http.post(route, json=body, headers={"Authorization": f"Bearer {key}"}) as response:
        if response.status != 200:
            raise Internal(f"the server answered {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise Internal(f"the server broke off: {chunk['error']['message']}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if fresh := choice.get("token_ids"):
                    moments.append(time.perf_counter())
                    token_ids += fresh
                parts.append((choice["delta"].get("content") if chat else choice["text"]) or "")
    gaps = [late - early for early, late in pairwise(moments)]
    return Answer("".join(parts), token_ids, moments[0] - started, gaps, usage)


def show(model: str, rows: list[tuple[Ask, Answer, bool]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: where each prompt token's KV came from", title_justify="left")
    for name in ("request", "tenant"):
        table.add_column(name)
    for name in ("prompt\ntokens", "reused\ngpu", "reused\nhost", "computed\nprefill", "computed\ndecode",
                 "pulled\nMiB", "TTFT\nms", "ITL\nms", "same as\nuncached"):  # fmt: skip
        table.add_column(name, justify="right")
    for ask, answer, same in rows:
        took = answer.usage["kvferry"]
        table.add_row(
            ask.what,
            ask.tenant,
            str(answer.usage["prompt_tokens"]),
            *(f"[green]{n}[/]" if n else "0" for n in (took["reused"]["gpu"], took["reused"]["host"])),
            str(took["computed"]["prefill"]),
            str(took["computed"]["decode"]),
            f"{took['bytes_pulled'] / 2**20:.1f}",
            f"{answer.ttft_s * 1e3:.0f}",
            f"{median(answer.gaps_s) * 1e3:.1f}" if answer.gaps_s else "-",
            "[green]yes[/]" if same else "[red]NO[/]",
        )
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(
        "reused: nobody computed it for this request (gpu: found in a worker's page pool; host: pulled from the block "
        "store). pulled: block bytes moved out of the store, by prefill and decode. same as uncached: the request "
        "again under a cache_salt never used before, token by token."
    )
    if not all(same for _, _, same in rows):
        raise Internal("an answer differs from the same request computed without reuse")
