"""Token ids to text, piece by piece, and stop strings in it.

What is sent cannot be taken back, so two things are held: an end that may be an unfinished character, and an end that
may be the beginning of a stop string.
"""

from collections.abc import Callable, Iterable, Sequence

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character, or not yet
MAX_HELD = 3  # tokens of an unfinished UTF-8 character: four bytes finish or spoil any
MAX_WINDOW = 12  # tokens decoded together; more than two characters can have


class Detokenizer:
    """The text of one token stream, in pieces that add up to the decoding of the whole.

    A window of the last tokens is decoded again with each push, because a token's text depends on its neighbours
    (spaces, characters in several tokens). The window is cut where decoding both sides apart gives the same text, so
    the work per token does not grow. For byte-level tokenizers the sum is exact for any ids; for those with byte
    fallback, for any that decode to valid text.
    """

    def __init__(self, decode: Callable[[list[int]], str], shows: Callable[[int], bool], stops: "StopScanner"):
        """`decode` must accept every id that `shows` admits; the others (special tokens) have no text."""
        self._decode = decode
        self._shows = shows
        self._stops = stops
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that are out

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found. Nothing comes out any more."""
        return self._stops.found is not None

    @property
    def stop(self) -> str | None:
        """The stop string that was found."""
        return self._stops.found

    def push(self, token_ids: Iterable[int], may_stop: bool = True) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string ended it. Unless it `may_stop`, stop strings that
        become complete with these tokens are text as any other."""
        if self.stopped:
            return "", True
        self._window += [token for token in token_ids if self._shows(token)]
        for held in range(MAX_HELD + 1):
            certain = self._window[: max(len(self._window) - held, 0)]
            text = self._decode(certain)
            if not text.endswith(REPLACEMENT):
                break
        ready = self._stops.push(self._take(text), may_stop)
        self._shorten(certain, text)
        return ready, self.stopped

    def finish(self) -> str:
        """The rest: the stream ends here, so what was held can no longer become anything else."""
        if self.stopped:
            return ""
        return self._stops.push(self._take(self._decode(self._window))) + self._stops.finish()

    def _take(self, text: str) -> str:
        taken = text[self._sent :]
        self._sent += len(taken)
        return taken

    def _shorten(self, certain: list[int], text: str) -> None:
        """Drop the longest part of the window that the text after it does not depend on. `text` is that of the tokens
        in `certain`, the window without what is held."""
        if len(certain) <= MAX_WINDOW:
            return
        for cut in range(len(certain) - 1, 0, -1):
            before, after = self._decode(certain[:cut]), self._decode(certain[cut:])
            if text in (before + after, f"{before} {after}"):  # some decoders strip the space that a text begins with
                del self._window[:cut]
                self._sent -= len(text) - len(after)
                return


class StopScanner:
    """Cuts a text before the stop string that is complete first (of two that end together, the longer).

    One Knuth-Morris-Pratt automaton a stop string: each character costs the same however the text arrives, and the
    longest state of all is what must be held back. `included`: cut after the stop string instead.
    """

    def __init__(self, stops: Sequence[str], included: bool = False):
        self._included = included
        self._stops = tuple(stops)
        self._tables = tuple(_failure_table(stop) for stop in stops)
        self._states = [0] * len(self._stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, may_stop: bool = True) -> str:
        """What of the text so far can be sent and was not yet. Unless it `may_stop`, a stop string that becomes
        complete in it does nothing."""
        if not self._stops:
            return text
        start = len(self._held)
        pending = self._held + text
        for end in range(start, len(pending)):
            if (length := self._step(pending[end], may_stop)) is not None:
                self._held = ""
                return pending[: end + 1 - (0 if self._included else length)]
        keep = max(self._states)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def finish(self) -> str:
        """What was held in case it became a stop string."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str, may_stop: bool) -> int | None:
        """Move every automaton on by a character. The length of the stop string that it completed, if any. One that
        must not stop goes on from what can still become another."""
        complete = 0
        for i, (stop, table) in enumerate(zip(self._stops, self._tables, strict=True)):
            state = self._states[i]
            while state and stop[state] != char:
                state = table[state - 1]
            self._states[i] = state = state + (stop[state] == char)
            if state < len(stop):
                continue
            if not may_stop:
                self._states[i] = table[-1]
            elif state > complete:
                complete, self.found = state, stop
        return complete or None


def _failure_table(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        length += pattern[i] == pattern[length]
        table[i] = length
    return table
