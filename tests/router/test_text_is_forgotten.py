"""Whatever is keyed by text would be shared by all tenants, so there is no such thing: neither a cache of Python's nor
the tokenizer's own, which only the clock shows."""

import asyncio
import gc
import random
import time
from functools import lru_cache
from statistics import median

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvferry.cli.demo_model import byte_tokenizer
from kvferry.router.openai import Conversation, Message
from kvferry.router.text import Tokenizer, remember_nothing

MARK = ("the ferry", "of tomorrow", "is full")


def holders_of(mark: str) -> list[str]:
    """The types of all objects there are that hold a text with the mark in it."""
    gc.collect()
    found = []
    for holder in gc.get_objects():
        for held in gc.get_referents(holder):
            text = held.decode(errors="replace") if type(held) is bytes else held
            if type(text) is str and mark in text:
                found.append(type(holder).__name__)
    return found


def use(tokenizer: Tokenizer, mark: str) -> None:
    """All that a request has done with its text, short and long."""

    async def main():
        for times in (1, 1000):
            text = (mark + " ") * times
            (tokens,) = await tokenizer.encode([text])
            await tokenizer.encode([Conversation((Message("system", text), Message("user", text)))])
            await tokenizer.bad_words([mark])
            detokenizer = tokenizer.detokenizer([mark + "!"])
            assert mark in detokenizer.push(tokens)[0] + detokenizer.finish()

    asyncio.run(main())


def test_no_object_holds_a_text_that_was_tokenised():
    tokenizer = Tokenizer(byte_tokenizer())
    use(tokenizer, "-".join(MARK))
    assert holders_of("-".join(MARK)) == []
    tokenizer.close()


def test_one_that_does_would_be_seen():
    @lru_cache
    def cached(text: str) -> int:
        return len(text)

    cached(" - ".join(MARK))
    assert holders_of(" - ".join(MARK)) != []


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One whose words take far longer to split than to look up."""
    letters = "abcdefgh"
    pairs = [a + b for a in letters for b in letters]
    merges = [(a, b) for a in letters for b in letters] + [(a, b) for a in pairs for b in pairs]
    tokens = [*letters, *(a + b for a, b in merges)]
    rust = RustTokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=rust)


def again_over_first(tokenizer: PreTrainedTokenizerFast) -> float:
    """How long words take that were there before, over how long they took as new ones; the median of 9 texts."""
    source, ratios = random.Random(7), []
    for _ in range(9):
        text = " ".join("".join(source.choices("abcdefgh", k=200)) for _ in range(300))
        took = []
        for _ in range(2):
            before = time.thread_time()
            tokenizer.backend_tokenizer.encode(text)
            took.append(time.thread_time() - before)
        ratios.append(took[1] / took[0])
    return median(ratios)


def test_a_word_takes_as_long_whether_somebody_has_sent_it_or_not():
    kept, forgotten = word_tokenizer(), word_tokenizer()
    remember_nothing(forgotten)
    assert again_over_first(kept) < 0.75, "the clock does not show a cache that is there"
    assert again_over_first(forgotten) > 0.75
    assert forgotten.encode("abcd efgh a") == kept.encode("abcd efgh a")


def test_a_tokenizer_in_python_keeps_nothing_either():
    class InPython:
        def __init__(self):
            self.cache = {"old": "o ld"}

    tokenizer = InPython()
    remember_nothing(tokenizer)
    tokenizer.cache["new"] = "n ew"
    assert not tokenizer.cache


def test_every_tokenizer_that_serves_is_told_to_forget():
    tokenizer = word_tokenizer()
    assert Tokenizer(tokenizer).encode_now("abcd")
    assert again_over_first(tokenizer) > 0.75
