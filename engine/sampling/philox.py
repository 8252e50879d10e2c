"""The noise of sampling: the counter-based generator Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", SC 2011), keyed by the seed and counted by (vocabulary index // 4, position, choice). Each counter gives the
noise of four neighbours. Nothing depends on a batch or on what was drawn before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

MASK32 = 0xFFFFFFFF
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
SHORT_ROUNDS = 2  # after two rounds every word depends on every part of the counter
PIECE = 2**14  # lanes whose words stay in a core's cache

Word = Any  # an int64 tensor or array
Out = Sequence[Word | None]


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


def philox(counter: Sequence[Word], key: Sequence[Word | int], halves: tuple[Out, Out] | None = None) -> list[Word]:
    """Four 32-bit words in int64 -> four like them, of the shape that all of them broadcast to. Words are tensors, or
    arrays of NumPy, which wait for no barrier of threads.

    `halves` are twice four buffers of that shape, in which the words are worked on; the answer is the second four.
    """
    lib = np if isinstance(counter[0], np.ndarray) else torch
    c, (k0, k1) = list(counter), key
    for number in range(ROUNDS):
        # The first rounds are short: there are words in them that hang on the row alone, or on the lane alone.
        out = [None] * 4 if halves is None or number < SHORT_ROUNDS else halves[number % 2]
        # The second and the fourth word come out as whole products, of which the low half counts; the rest is cut off
        # when the next round folds them in.
        product0 = lib.multiply(c[0], PHILOX_M0, out=out[3])
        product1 = lib.multiply(c[2], PHILOX_M1, out=out[1])
        c = [_fold(lib, product1, c[1], k0, out[0]), product1, _fold(lib, product0, c[3], k1, out[2]), product0]
        k0, k1 = (k0 + PHILOX_W0) & MASK32, (k1 + PHILOX_W1) & MASK32
    for word in (c[1], c[3]):
        lib.bitwise_and(word, MASK32, out=word)
    return c


def _fold(lib: Any, product: Word, word: Word, key: Word | int, out: Word | None) -> Word:
    """32 bits: the high half of a product ^ word ^ key. A product wraps modulo 2^64, so all of its bits are there."""
    folded = lib.bitwise_right_shift(product, 32, out=out)
    folded = lib.bitwise_xor(folded, word, out=out)
    folded = lib.bitwise_xor(folded, key, out=out)
    return lib.bitwise_and(folded, MASK32, out=out)


def bits_of(tokens: torch.Tensor, keys: Keys) -> torch.Tensor:
    """The 32 bits of each of the tokens `[R, C]`, all int64."""
    counter = (tokens >> 2, keys.position_low, keys.position_high, keys.choice)
    words = philox(counter, (keys.seed_low, keys.seed_high))
    return torch.stack(words).gather(0, (tokens & 3)[None])[0]


def bits_of_all(lanes: int, keys: Keys, buffers: torch.Tensor) -> torch.Tensor:
    """The bits of every token, int64 `[4, R, lanes]`: at `[j, r, i]` those of token 4 i + j. They lie in `buffers`,
    int64 `[8 * R * lanes]` at least, on the device of `keys`."""
    rows = len(keys.choice)
    work, bits = buffers[: 8 * rows * lanes].view(2, 4, rows, lanes)
    columns = [getattr(keys, name) for name in keys.__slots__]
    numbers = torch.arange(lanes, device=buffers.device)[None]
    if buffers.device.type != "cpu":
        philox((numbers, *columns[2:]), columns[:2], (work.unbind(), bits.unbind()))
        return bits
    columns, number, out = [column.numpy() for column in columns], numbers.numpy(), bits.numpy()
    height, width = max(1, PIECE // lanes), min(lanes, PIECE)
    for top, left in product(range(0, rows, height), range(0, lanes, width)):
        its = out[:, top : top + height, left : left + width]
        scratch = buffers[: its.size].view(its.shape).numpy()  # the same for every piece, so that it stays in the cache
        seed_low, seed_high, *counter = (column[top : top + height] for column in columns)
        philox((number[:, left : left + width], *counter), (seed_low, seed_high), (scratch, its))
    return bits


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Gumbel(0, 1) noise, float64, from 32 uniform bits: -log(-log u) with u = (bits + 1/2) / 2^32."""
    uniform = (bits.to(torch.float64) + 0.5) / 2.0**32
    return -torch.log(-torch.log(uniform))
