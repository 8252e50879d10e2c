"""The fingerprint that makes KV interchangeable: nodes with equal ones compute equal KV for equal tokens.

It is XXH3-128 over the config, every weight byte, the dtype and `KV_CODE_VERSION`.
"""

import json
from pathlib import Path

import msgspec
import xxhash
from transformers import PreTrainedConfig

from kvferry.common.config import cache_dir
from kvferry.common.hashing import length_prefixed
from kvferry.engine.loading.files import weight_files
from kvferry.engine.loading.progress import Progress

KV_CODE_VERSION = 4  # raised whenever our own arithmetic changes what ends up in a block
WEIGHT_CHUNK = 2**24
NOT_ARITHMETIC = ("_name_or_path", "transformers_version", "dtype", "use_cache")


def fingerprint_of(folder: Path, hf_config: PreTrainedConfig, dtype: str, progress: Progress) -> bytes:
    """16 bytes. What is in the config but does not reach the arithmetic (who saved it, where) is left out. Raises
    ConfigError for weights that are missing or broken."""
    told = hf_config.to_dict()
    for key in NOT_ARITHMETIC:
        told.pop(key, None)
    digests = hash_files(weight_files(folder), progress)
    config_text = json.dumps(told, sort_keys=True, default=str)
    return xxhash.xxh3_128_digest(length_prefixed("kvferry-model", KV_CODE_VERSION, dtype, config_text, *digests))


def hash_files(files: list[Path], progress: Progress) -> list[bytes]:
    """XXH3-128 of each file. Remembered in the cache folder by path, size, mtime and inode."""
    memory = cache_dir() / "fingerprints.json"
    try:
        known = msgspec.json.decode(memory.read_bytes(), type=dict[str, str])
    except (FileNotFoundError, msgspec.MsgspecError):
        known = {}
    total, done, digests, fresh = sum(f.stat().st_size for f in files), 0, [], {}
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        if key not in known:
            digest = xxhash.xxh3_128()
            with file.open("rb") as stream:
                while chunk := stream.read(WEIGHT_CHUNK):
                    digest.update(chunk)
                    progress("hash", done := done + len(chunk), total)
            known[key] = fresh[key] = digest.hexdigest()
        else:
            progress("hash", done := done + stat.st_size, total)
        digests.append(bytes.fromhex(known[key]))
    if fresh:
        scratch = memory.with_suffix(f".{stat.st_ino}.{id(fresh)}.tmp")
        scratch.write_text(json.dumps(known))
        scratch.replace(memory)
    return digests
