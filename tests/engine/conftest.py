"""Tiny checkpoints, our models of them and the reference's, each made once a session, when it is first asked for. Read
only: copy to change one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint

from kvferry.common.config import EngineConfig
from kvferry.engine.loading.model import LoadedModel, load_model


class Made(dict):
    """A dict by architecture whose values are made on first use."""

    def __init__(self, make: Callable[[str], object]):
        super().__init__()
        self._make = make

    def __missing__(self, arch: str) -> object:
        self[arch] = self._make(arch)
        return self[arch]


@pytest.fixture(scope="session")
def checkpoint_folders(tmp_path_factory) -> dict[str, Path]:
    """A folder with a tiny random checkpoint for each architecture."""
    base = tmp_path_factory.mktemp("checkpoints")
    return Made(lambda arch: tiny_checkpoint(base / arch, arch))


@pytest.fixture(scope="session")
def models(checkpoint_folders, tmp_path_factory) -> dict[str, LoadedModel]:
    """Our loaded models by architecture: float32 on the CPU, blocks of 16 tokens."""
    cache = tmp_path_factory.mktemp("cache")

    def load(arch: str) -> LoadedModel:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(cache))
            config = EngineConfig(model=str(checkpoint_folders[arch]), dtype="float32", device="cpu", threads=1)
            return load_model(config, lambda *_: None)

    return Made(load)


@pytest.fixture(scope="session")
def references(checkpoint_folders):
    """The same models as transformers runs them, with their own eager attention."""
    from transformers import AutoModelForCausalLM

    def load(arch: str):
        folder = checkpoint_folders[arch]
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    return Made(load)
