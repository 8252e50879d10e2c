"""The noise of sampling: the counter-based generator Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", SC 2011), keyed by the seed and counted by (vocabulary index // 4, position, choice). Each counter gives the
noise of four neighbours. Nothing depends on a batch or on what was drawn before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MASK32 = 0xFFFFFFFF
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
SHORT_ROUNDS = 2  # after two rounds every word depends on every part of the counter
BUFFERS = 8

Word = torch.Tensor | int


@dataclass(frozen=True, slots=True)
class Keys:
    """What chooses the noise of R rows: int64 `[R, 1]` each, on the device where it is wanted. Low and high are the two
    halves of a 64-bit value."""

    seed_low: torch.Tensor
    seed_high: torch.Tensor
    position_low: torch.Tensor
    position_high: torch.Tensor
    choice: torch.Tensor

    def rows(self, start: int, stop: int) -> "Keys":
        return Keys(*[getattr(self, name)[start:stop] for name in self.__slots__])


def philox(
    counter: Sequence[torch.Tensor], key: tuple[Word, Word], buffers: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Four int64 tensors holding 32-bit words -> four like them, of the shape that all of them broadcast to.

    `buffers`, int64 `[BUFFERS, *shape]`, saves the allocations; the answer is then its last four.
    """
    c, (k0, k1) = list(counter), key
    none = [None] * 4
    halves = (none, none) if buffers is None else (buffers[:4].unbind(), buffers[4:].unbind())
    for number in range(ROUNDS):
        # The first rounds are short: there are words in them that hang on the row alone, or on the lane alone.
        c = _round(c, (k0, k1), none if number < SHORT_ROUNDS else halves[number % 2])
        k0, k1 = (k0 + PHILOX_W0) & MASK32, (k1 + PHILOX_W1) & MASK32
    return [c[0], c[1].bitwise_and_(MASK32), c[2], c[3].bitwise_and_(MASK32)]


def _round(c: Sequence[torch.Tensor], key: tuple[Word, Word], out: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The second and the fourth word come out as whole products, of which the low half counts; the rest is cut off when
    the next round folds them in."""
    product0 = torch.mul(c[0], PHILOX_M0, out=out[3])
    product1 = torch.mul(c[2], PHILOX_M1, out=out[1])
    return [_fold(product1, c[1], key[0], out[0]), product1, _fold(product0, c[3], key[1], out[2]), product0]


def _fold(product: torch.Tensor, word: torch.Tensor, key: Word, out: torch.Tensor | None) -> torch.Tensor:
    """32 bits: the high half of a product ^ word ^ key. A product wraps modulo 2^64, so all of its bits are there."""
    folded = torch.bitwise_right_shift(product, 32, out=out)
    folded = torch.bitwise_xor(folded, word, out=out)
    folded = torch.bitwise_xor(folded, key, out=out)
    return torch.bitwise_and(folded, MASK32, out=out)


def words(lanes: torch.Tensor, keys: Keys, buffers: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Word j of lane i is the noise of token 4 i + j. `lanes` int64 `[1, L]` or `[R, L]` -> four of int64 `[R, L]`."""
    counter = (lanes, keys.position_low, keys.position_high, keys.choice)
    return philox(counter, (keys.seed_low, keys.seed_high), buffers)


def bits_of(tokens: torch.Tensor, keys: Keys) -> torch.Tensor:
    """The 32 bits of each of the tokens `[R, C]`, all int64."""
    return torch.stack(words(tokens >> 2, keys)).gather(0, (tokens & 3)[None])[0]


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Gumbel(0, 1) noise, float64, from 32 uniform bits: -log(-log u) with u = (bits + 1/2) / 2^32."""
    uniform = (bits.to(torch.float64) + 0.5) / 2.0**32
    return -torch.log(-torch.log(uniform))
