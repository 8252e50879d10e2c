"""kvferry with one fault built in, for the tests that the oracle sees faults. Run as the `kvferry` command is.

    MUTANT_OF_KVFERRY=FILE python mutants.py serve MODEL ...

The file holds the name of the fault, or nothing, and is read each time, so that one cluster can have them all in turn.
`serve` starts its children the way it was started, so they are patched as well.
"""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np

from kvferry.cli.main import app
from kvferry.kvstore.client import StoreClient

VARIABLE = "MUTANT_OF_KVFERRY"
SWAPPED, ZEROED = "swapped", "zeroed"  # a block that a worker has pulled and verified
POSITIONS = "positions"  # decode believes every token to be one further on
MUTANTS = (SWAPPED, ZEROED, POSITIONS)


def fault() -> str:
    return Path(os.environ[VARIABLE]).read_text()


def spoil_pulls() -> None:
    """Swapped means: the first block of each pull and that of the next one change places. (Two blocks of one pull may
    change places unseen: attention is a sum over what it finds, wherever that lies.)"""
    pull = StoreClient.pull
    kept: list[np.ndarray] = []

    async def spoilt(self: StoreClient, match, into, seal) -> int:
        good = await pull(self, match, into, seal)
        blocks = [np.frombuffer(view, dtype=np.uint8) for view in into[:good]]
        if fault() == ZEROED and blocks:
            blocks[0][:] = 0
        if fault() == SWAPPED and blocks:
            kept.append(blocks[0].copy())
            blocks[0][:] = kept[0]
            del kept[:-1]
        return good

    StoreClient.pull = spoilt


def spoil_positions() -> None:
    from kvferry.engine import runner

    lay_out = runner.lay_out

    def spoilt(*what):
        inputs = lay_out(*what)
        return dataclasses.replace(inputs, positions=inputs.positions + (fault() == POSITIONS))

    runner.lay_out = spoilt


if __name__ == "__main__":
    spoil_pulls()
    if sys.argv[1] == "decode":
        spoil_positions()
    sys.exit(app())
