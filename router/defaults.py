"""How the model's makers advise to sample: what `generation_config.json` says, where a client leaves it open."""

import json
from pathlib import Path

import msgspec

from kvferry.common.errors import ConfigError
from kvferry.router.values import MinP, Repetition, Temperature, TopK, TopP

FILE = "generation_config.json"


class SamplingDefaults(msgspec.Struct, frozen=True):
    """A parameter that is not advised has OpenAI's default, which is to leave the logits as they are."""

    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: Repetition = 1.0


NO_DEFAULTS = SamplingDefaults()


def load_defaults(model: str, revision: str | None = None) -> SamplingDefaults:
    """Those of a local folder or a Hugging Face id; NO_DEFAULTS where it has no such file. Reads files or the network.
    Raises ConfigError for one that is not valid."""
    from transformers.utils import cached_file  # takes two seconds, so only who loads a model pays

    try:
        found = cached_file(model, FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:  # of the network, too
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{FILE} of {model} cannot be looked for: {reason}") from error
    return NO_DEFAULTS if found is None else read_defaults(Path(found))


def read_defaults(file: Path) -> SamplingDefaults:
    """What a generation_config.json says. Raises ConfigError."""
    try:
        advised = json.loads(file.read_bytes())
        advised = {name: advised[name] for name in SamplingDefaults.__struct_fields__ if advised.get(name) is not None}
        return msgspec.convert(advised | {"top_k": max(advised.get("top_k", 0), 0)}, SamplingDefaults)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{file} is not valid: {error}; mend it, or take it out of the model's folder") from error
