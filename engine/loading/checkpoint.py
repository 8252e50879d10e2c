"""What a checkpoint says of itself: its config and the tokens that end its sequences."""

from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from kvferry.engine.loading.files import told_as


def read_config(folder: Path) -> PreTrainedConfig:
    with told_as(f"{folder} holds no usable config.json"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def end_tokens(folder: Path, hf_config: PreTrainedConfig) -> tuple[int, ...]:
    """The ids that end a sequence: of generation_config.json where there is one that names them, else of the config."""
    ids = None
    if (folder / "generation_config.json").exists():
        with told_as(f"{folder} holds no usable generation_config.json"):
            ids = GenerationConfig.from_pretrained(folder).eos_token_id
    ids = hf_config.eos_token_id if ids is None else ids
    return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)
