"""Flags that several commands share, each declared once and named as users of vLLM know it.

Defaults are those of `common.config`; a flag that is not given is left to it.
"""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from kvferry.common.config import EngineConfig, RouterConfig, StoreConfig, WorkerConfig, parse_size


def size_text(size: int) -> str:
    """Bytes as a person writes them, in the largest binary unit that divides them."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % parse_size(f"1{unit}") == 0:
            return f"{size // parse_size(f'1{unit}')}{unit}"
    return str(size)


ENGINE, WORKER, ROUTER, STORE = (
    {field.name: field.default for field in fields(config)}
    for config in (EngineConfig, WorkerConfig, RouterConfig, StoreConfig)
)
KV_CACHE_SIZE = size_text(ENGINE["kv_cache_bytes"])
STORE_SIZE = size_text(STORE["size_bytes"])
MAX_BODY_SIZE = size_text(ROUTER["max_body_bytes"])

MODEL_HELP = "`demo`, a Hugging Face id or a local folder."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")]
ServedModelName = Annotated[str | None, typer.Option(help="What clients call the model.  [default: MODEL]")]

DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
BlockSize = Annotated[int, typer.Option(help="Tokens a KV block; the same for every worker of a store.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt and answer in tokens.  [default: the model's]")]
MaxNumSeqs = Annotated[int, typer.Option(help="Sequences in one step, at most.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Tokens in one step, at most; longer prompts go in chunks.")]
MaxWaiting = Annotated[int, typer.Option(help="Sequences that may wait; more are refused.")]
KvCacheSize = Annotated[str, typer.Option(metavar="SIZE", help="Memory for KV pages, such as 4GiB.")]
NumBlocks = Annotated[
    int | None, typer.Option("--num-gpu-blocks-override", help="KV pages as a number of blocks, instead of a size.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads a worker.  [default: the cores, shared out]")]

StoreSocket = Annotated[Path, typer.Option(help="Unix socket of this host's store node.")]
LeaseSeconds = Annotated[float, typer.Option(help="How long a silent connection keeps its leases.")]

Host = Annotated[str, typer.Option(help="Address to listen on; others than loopback need --tenants-file.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port of the API.")]
AdminHost = Annotated[str, typer.Option(help="Address of /metrics and the operators' pages.")]
AdminPort = Annotated[int, typer.Option(min=0, max=65535, help="Port of /metrics and the operators' pages.")]
TenantsFile = Annotated[
    Path | None, typer.Option(help="Who may ask; see `kvferry keys`. Without it there is one tenant and no keys.")
]
MaxLocalPrefillLength = Annotated[
    int, typer.Option(help="Up to so many prompt tokens that are not cached are computed by decode itself.")
]
DrainSeconds = Annotated[float, typer.Option(help="On SIGTERM, how long requests under way may take to finish.")]

NotifyFd = Annotated[int | None, typer.Option(help="Descriptor to report progress and readiness on, as JSON lines.")]
ParentPid = Annotated[int | None, typer.Option(help="End when this parent process ends.")]
LogLevel = Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")]
