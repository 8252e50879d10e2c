"""Tiny checkpoints, our models of them and the reference's, each made once a session. Read only: copy to change one."""

from pathlib import Path

import pytest
import torch
from checkpoints import ARCHITECTURES, tiny_checkpoint

from kvferry.common.config import EngineConfig
from kvferry.engine.model import load_model


@pytest.fixture(scope="session")
def checkpoint_folders(tmp_path_factory) -> dict[str, Path]:
    """A folder with a tiny random checkpoint for each architecture."""
    base = tmp_path_factory.mktemp("checkpoints")
    return {arch: tiny_checkpoint(base / arch, arch) for arch in ARCHITECTURES}


@pytest.fixture(scope="session")
def models(checkpoint_folders, tmp_path_factory):
    """Our loaded models by architecture: float32 on the CPU, blocks of 16 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return {
            arch: load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu", threads=1), lambda *_: None)
            for arch, folder in checkpoint_folders.items()
        }


@pytest.fixture(scope="session")
def references(checkpoint_folders):
    """The same models as transformers runs them, with its own attention."""
    from transformers import AutoModelForCausalLM

    return {
        arch: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        for arch, folder in checkpoint_folders.items()
    }
