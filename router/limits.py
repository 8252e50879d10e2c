"""How much one request may ask for, and how long it may take to say so: looked at before any work is done for it."""

from dataclasses import dataclass, field, fields
from typing import Any

from kvferry.common.values import WrongValue, require_least


def _limit(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Every bound of the HTTP side. A request at a bound passes, one beyond it is refused with a message of its own.

    Names ending in `_bytes` are sizes, those in `_s` are seconds. Raises ConfigError for a bound that would refuse
    everything.
    """

    body_bytes: int = _limit(16 * 2**20, "Largest request body.")
    header_bytes: int = _limit(16 * 2**10, "Largest head of a request: its first line and all its headers.")
    header_s: float = _limit(60.0, "How long a connection may be idle, or take to send the head of its next request.")
    body_s: float = _limit(60.0, "How long the body of a request may take to arrive.")
    write_s: float = _limit(30.0, "How long a client may read nothing while there is something to read.")
    json_depth: int = _limit(32, "How deep objects and lists of a body may be nested.")
    json_values: int = _limit(2**16, "Strings, lists and objects of a body; numbers: prompt_tokens more.")
    messages: int = _limit(4096, "Messages of a chat.")
    parts: int = _limit(4096, "Text parts of a chat's messages.")
    prompts: int = _limit(128, "Prompts of a batch.")
    prompt_chars: int = _limit(
        2**20, "Characters of all text prompts of a request; a chat's once more as its template has it."
    )
    prompt_tokens: int = _limit(2**20, "Tokens of all prompts of a request.")
    n: int = _limit(64, "Answers to a prompt; a worker's --max-num-seqs bounds them too.")
    choices: int = _limit(256, "Answers of a request: prompts times n.")
    choices_at_once: int = _limit(32, "Answers of a batch that run side by side; one prompt's always do.")
    stops: int = _limit(16, "Stop strings of a request.")
    stop_chars: int = _limit(256, "Characters of a stop string.")
    stop_token_ids: int = _limit(128, "Stop tokens of a request.")
    bad_words: int = _limit(128, "Words of a request that must not be said.")
    bad_word_chars: int = _limit(256, "Characters of such a word.")
    logit_bias: int = _limit(1024, "Tokens of a request that have a bias.")
    logprobs: int = _limit(20, "Likeliest tokens that are told beside each token.")
    told: int = _limit(2**18, "Log probabilities of all prompts; and, where it is not streamed, of an answer.")

    def __post_init__(self) -> None:
        for one in fields(self):
            least, value = (0 if one.name in ("logprobs", "told") else 1), getattr(self, one.name)
            if one.name.endswith("_s"):
                if not 0 < value < float("inf"):
                    raise WrongValue(self, one.name, f"is {value:g}; it must be a number of seconds above 0")
            else:
                require_least(self, least, one.name)


DEFAULT_LIMITS = Limits()
