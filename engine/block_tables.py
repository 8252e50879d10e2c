"""The block tables of all sequences that hold blocks, as rows of one array, so that a step's tables are one copy."""

import numpy as np


class BlockTables:
    """Rows of block ids, int64, zero behind what was written. Grows as it must; owned by the scheduler."""

    def __init__(self) -> None:
        self._blocks = np.zeros((16, 16), dtype=np.int64)
        self._free = list(range(16))

    def take(self, blocks: list[int]) -> int:
        """A row of one's own that begins with `blocks`."""
        if not self._free:
            rows = len(self._blocks)
            self._blocks = np.concatenate([self._blocks, np.zeros_like(self._blocks)])
            self._free = list(range(rows, 2 * rows))
        row = self._free.pop()
        self._fit(len(blocks))
        self._blocks[row, : len(blocks)] = blocks
        return row

    def give(self, row: int) -> None:
        """Let a row go."""
        self._free.append(row)

    def put(self, row: int, index: int, block: int) -> None:
        """Write one entry."""
        self._fit(index + 1)
        self._blocks[row, index] = block

    def gather(self, rows: np.ndarray, pages: int) -> np.ndarray:
        """A copy of the first `pages` entries of some rows: `[len(rows), pages]`."""
        self._fit(pages)
        return self._blocks[rows, :pages]

    def differs(self, row: int, blocks: list[int]) -> bool:
        """Whether a row that is taken holds something else."""
        return row >= 0 and self._blocks[row, : len(blocks)].tolist() != blocks

    def _fit(self, pages: int) -> None:
        if (width := self._blocks.shape[1]) < pages:
            wider = np.zeros((len(self._blocks), max(pages, 2 * width)), dtype=np.int64)
            wider[:, :width] = self._blocks
            self._blocks = wider
