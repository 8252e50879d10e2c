"""Flags that other servers have and this one does not, and what there is instead."""

from collections.abc import Mapping
from types import MappingProxyType

ONE_DEVICE = "a model runs on one device; for more throughput give more workers, by --prefill and --decode"
ALWAYS_ON = "it is not needed, as it always is so"
KEYS = "`kvferry keys create TENANT --tenants-file FILE` makes a key, and --tenants-file FILE asks for it"
NO_TLS = "a proxy in front of it speaks TLS"
NO_TOOLS = "tools are not supported"
NO_GRAPHS = "it is not needed, as no graphs are captured"

FOREIGN: Mapping[str, str] = MappingProxyType(
    {
        "--api-key": KEYS,
        "--chat-template": "the chat template is that of the model's folder",
        "--cpu-offload-gb": "weights are whole on one device; try --dtype bfloat16",
        "--data-parallel-size": ONE_DEVICE,
        "--disable-log-requests": "prompts are never logged; --log-level WARNING logs no requests either",
        "--download-dir": "the hub's cache is where HF_HOME says",
        "--enable-auto-tool-choice": NO_TOOLS,
        "--enable-chunked-prefill": f"{ALWAYS_ON}; --max-num-batched-tokens is the largest chunk",
        "--enable-lora": "adapters are not supported; merge them into the weights",
        "--enable-prefix-caching": f"{ALWAYS_ON}; --kv-cache-size and --store-size say for how much",
        "--enforce-eager": NO_GRAPHS,
        "--gpu-memory-utilization": "--kv-cache-size says how much memory KV pages take, such as 8GiB",
        "--hf-token": "give it as HF_TOKEN in the environment",
        "--kv-cache-dtype": "KV has the model's dtype, which --dtype says",
        "--kv-transfer-config": "it is not needed, as prefill and decode share a store from the start",
        "--load-format": "weights are safetensors",
        "--max-seq-len-to-capture": NO_GRAPHS,
        "--model": "the model has no flag; it comes first, as in `kvferry serve demo`",
        "--no-enable-prefix-caching": "reuse is always on; a request's `cache_salt` keeps it apart",
        "--pipeline-parallel-size": ONE_DEVICE,
        "--quantization": "quantized weights are not supported; --dtype bfloat16 halves those of float32",
        "--seed": "each request has its own `seed`",
        "--speculative-config": "speculative decoding is not supported",
        "--ssl-certfile": NO_TLS,
        "--ssl-keyfile": NO_TLS,
        "--swap-space": "it is not needed, as KV that is pushed out is found again in the store, of --store-size",
        "--tensor-parallel-size": ONE_DEVICE,
        "--tool-call-parser": NO_TOOLS,
        "--trust-remote-code": "code of a model is never run; only models that transformers knows by itself are served",
    }
)
