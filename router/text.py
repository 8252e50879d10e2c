"""Text to token ids: the model's tokenizer, its chat template, and the check of ids against the vocabulary. And what
each token is by itself."""

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kvferry.common.errors import ConfigError, InvalidRequest
from kvferry.router.chat import ChatTemplate
from kvferry.router.detokenize import Detokenizer, StopScanner
from kvferry.router.limits import DEFAULT_LIMITS, Limits
from kvferry.router.openai import Conversation, Prompt
from kvferry.router.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURN_CHARS = 32  # what a template adds to a message, roughly
INLINE_CHARS = 4096  # about 1 ms of tokenising; more goes to a thread
SHORT_CHARS = 2**16  # about 0.1 s; more goes to the other thread
BYTE = re.compile("<0x([0-9A-F]{2})>")  # how tokenizers with byte fallback write one
REPLACEMENT = "\ufffd"
T = TypeVar("T")


def load_tokenizer(model: str, revision: str | None = None) -> "Tokenizer":
    """The tokenizer of a local folder or a Hugging Face id. Reads files or the network. Raises ConfigError."""
    from transformers import AutoTokenizer  # takes two seconds, so only who loads one pays

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        told = "" if Path(model).is_dir() else f"there is no folder {model} on this host, and "
        raise ConfigError(f"{told}the tokenizer of {model} cannot be loaded: {reason.rstrip('.')}") from error
    if not tokenizer.encode("a b", add_special_tokens=False):  # what transformers makes up where there are no files
        raise ConfigError(f"the tokenizer of {model} makes no tokens of a text; is its tokenizer.json there?")
    return Tokenizer(tokenizer)


def remember_nothing(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Switch off the cache of words that a tokenizer keeps: it is keyed by text and for everybody, so how long a word
    takes would tell one tenant whether another has sent it."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if hasattr(model, "_resize_cache"):  # BPE and Unigram; the others keep none
        model._clear_cache()
        model._resize_cache(0)
    if hasattr(tokenizer, "cache"):  # the tokenizers that are Python keep every word
        tokenizer.cache = _Nothing()


def decoder(tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[int]], str]:
    """Token ids to their text, with nothing left out and nothing tidied. Most tokenizers only hand the ids on to the
    tokenizers library, and look at them for longer than it takes to decode a few."""
    from transformers import TokenizersBackend

    if getattr(type(tokenizer), "_decode", None) is TokenizersBackend._decode:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    return partial(tokenizer.decode, clean_up_tokenization_spaces=False)


def length_of(prompt: Prompt) -> int:
    """How much work it is to tokenise, as characters. What a client's own variables make a template do is not known; it
    is more than what is done at once."""
    if isinstance(prompt, Conversation):
        unknown = INLINE_CHARS if prompt.template_fields else 0
        return prompt.chars + TURN_CHARS * len(prompt.messages) + unknown
    return len(prompt) if isinstance(prompt, str) else 0


class _Nothing(dict[str, str]):
    """A dict that keeps nothing."""

    def __setitem__(self, key: str, value: str) -> None:
        return


def check_token_ids(token_ids: Sequence[int], vocab_size: int, field: str = "prompt") -> None:
    """Raise InvalidRequest for an empty prompt or an id that the model has no embedding for."""
    if not token_ids:
        raise InvalidRequest("the prompt has no tokens", field)
    found = np.asarray(token_ids)  # of a million it takes about a millisecond
    if not 0 <= found.min() <= found.max() < vocab_size:
        raise InvalidRequest(f"{field} has a token id outside of the model's vocabulary of {vocab_size}", field)


@dataclass(frozen=True, slots=True)
class Token:
    """A token by itself. `data`: its UTF-8 bytes, with the space that it begins with; part of a character perhaps, and
    None for an id that the tokenizer does not know. `shown`: whether it is part of a text; special tokens are not."""

    name: str
    data: bytes | None
    shown: bool


def token_name(data: bytes) -> str:
    """The text of a token; bytes that are no whole character as OpenAI writes them, with a backslash: `\\xe2\\x82`."""
    return data.decode(errors="backslashreplace")


class Tokenizer:
    """One model's tokenizer. What is long runs in a thread, so the event loop stays free; what is very long in another
    one, so that it keeps nobody waiting but its like. The tokenizers library works without Python's lock."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        remember_nothing(tokenizer)
        self._tokenizer = tokenizer
        self._decode_shown = decoder(tokenizer)
        self._short, self._long = (Turns(f"tokenize-{name}") for name in ("short", "long"))
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._special = frozenset(special | set(tokenizer.all_special_ids))
        self._known = len(tokenizer)  # the model's embedding may have more rows; those ids have no text
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._tokens: dict[int, Token] = {}
        self._chat = ChatTemplate(tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return self._chat.exists

    async def encode(
        self,
        prompts: Sequence[Prompt],
        special_tokens: bool | None = None,
        limits: Limits = DEFAULT_LIMITS,
        tenant: str = "",
    ) -> list[array]:
        """The token ids, of 32 bits each, of each of a request's prompts. `special_tokens`: whether the tokenizer adds
        those that it has for a text; unless told otherwise a text gets them, and a conversation has those of its
        template. Raises InvalidRequest."""

        def encoded(prompt: Prompt) -> array:
            if isinstance(prompt, array):
                return prompt
            return array("I", self.encode_now(prompt, special_tokens, limits))

        return await self.aside(sum(map(length_of, prompts)), lambda: list(map(encoded, prompts)), tenant)

    async def aside(self, chars: int, work: Callable[[], T], tenant: str = "") -> T:
        """Work on so many characters, or tokens, of a tenant's, here or in a thread."""
        if chars <= INLINE_CHARS:
            return work()
        return await (self._short if chars <= SHORT_CHARS else self._long).run(tenant, work)

    def encode_now(
        self, prompt: str | Conversation, special_tokens: bool | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> list[int]:
        """As `encode`, of one prompt that is a text or a conversation, and in the calling thread."""
        text = prompt
        if isinstance(prompt, Conversation):
            text = self._chat.render(prompt)
            if len(text) > limits.prompt_chars:
                raise InvalidRequest(
                    f"messages have {len(text)} characters as the model's chat template writes them; this server takes "
                    f"at most {limits.prompt_chars} in a request",
                    "messages",
                )
        added = isinstance(prompt, str) if special_tokens is None else special_tokens
        return self._tokenizer.encode(text, add_special_tokens=added)

    async def bad_words(self, words: Sequence[str], tenant: str = "") -> tuple[tuple[int, ...], ...]:
        """The token sequences of words that are never to be said: as a text begins with them, and after a space.
        Raises InvalidRequest for a word that has no tokens."""
        chars = 2 * sum(TURN_CHARS + len(word) for word in words)
        return await self.aside(chars, lambda: self._bad_words(words), tenant)

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        found: list[tuple[int, ...]] = []
        for word in words:
            at_start, within = (
                tuple(self._tokenizer.encode(lead + word.lstrip(), add_special_tokens=False)) for lead in ("", " ")
            )
            if not at_start:
                raise InvalidRequest("bad_words has a word that is no token of this model", "bad_words")
            found.append(at_start)
            if within[-len(at_start) :] != at_start:  # else barring the one bars the other
                found.append(within)
        return tuple(dict.fromkeys(found))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of whole token ids. Special tokens, and ids that the tokenizer does not know, have none."""
        return self._decode_shown([token for token in token_ids if self._shows(token)])

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """As `decode`, with special tokens as their names."""
        return self._decode_shown([token for token in token_ids if self._has_text(token)])

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the tokenizer's vocabulary has it."""
        return self._tokenizer.convert_ids_to_tokens(list(token_ids))

    def detokenizer(
        self, stop: Sequence[str] = (), include_stop: bool = False, skip_special_tokens: bool = True
    ) -> Detokenizer:
        shows = self._shows if skip_special_tokens else self._has_text
        return Detokenizer(self._decode_shown, shows, StopScanner(stop, include_stop))

    def token(self, token_id: int) -> Token:
        if (token := self._tokens.get(token_id)) is None:
            token = self._tokens[token_id] = self._describe(token_id)
        return token

    def _describe(self, token_id: int) -> Token:
        if token_id >= self._known:
            return Token(f"token_id:{token_id}", None, False)
        data = self._bytes_of(token_id)
        return Token(token_name(data), data, self._shows(token_id))

    def _bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text that goes before it: decoders take the space away that a text begins with."""
        before = self._tokenizer.decode(self._anchor, clean_up_tokenization_spaces=False)
        text = self._tokenizer.decode([*self._anchor, token_id], clean_up_tokenization_spaces=False)
        text = text.removeprefix(before)
        if REPLACEMENT not in text:
            return text.encode()
        written = self._tokenizer.convert_ids_to_tokens(token_id)
        if byte := BYTE.fullmatch(written):
            return bytes.fromhex(byte[1])
        if all(char in self._byte_level for char in written):
            return bytes(self._byte_level[char] for char in written)
        return text.encode()

    @cached_property
    def _byte_level(self) -> dict[str, int]:
        """How tokenizers that work on bytes write each one (that of GPT-2, which all of them took over)."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {char: byte for byte, char in bytes_to_unicode().items()}

    def leading_space(self, token_id: int) -> bool:
        """Whether a token begins with a space that is left out where a text begins with the token."""
        data = self.token(token_id).data or b""
        return data.startswith(b" ") and not self.decode([token_id]).startswith(" ")

    def close(self) -> None:
        for thread in (self._short, self._long):
            thread.close()

    def _has_text(self, token: int) -> bool:
        return token < self._known

    def _shows(self, token: int) -> bool:
        return self._has_text(token) and token not in self._special
