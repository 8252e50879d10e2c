"""Attention of rows of one token each, on the CPU: what all layers share is prepared once a step, and a layer is one
call of a compiled kernel."""

import torch

from kvferry.kernels.decode_kernel import ENTRIES, PIECE, Call, decode_kernel, scratch_floats
from kvferry.kernels.reference import Ragged, Scoring
from kvferry.kernels.workspace import Workspace


class CpuDecode:
    """The rows of one token of a step, as layers with one window see them. All arithmetic is fp32."""

    def __init__(self, pool: torch.Tensor, workspace: Workspace, ragged: Ragged, window: int | None, heads: int):
        _, kv_heads, _, _, block_size, head_dim = pool.shape
        self._pool, self._kernel = pool, decode_kernel(pool.dtype)
        rows = (ragged.lengths == 1).nonzero().flatten()
        self._tokens, self._tables = ragged.starts[rows], ragged.tables[rows]
        self._pieces, self._first = pieces(ragged.contexts[rows], window)
        self._all = len(rows) == len(ragged.lengths)  # then they are the batch, and in its order
        self._query = workspace.take("query", (len(rows), heads, head_dim), torch.float32)
        group = heads // kv_heads
        self._threads = torch.get_num_threads()
        shape = (self._threads, scratch_floats(group, head_dim))
        self._scratch = workspace.take("scratch", shape, torch.float32)
        self._partial = workspace.take("partial", (len(self._pieces), heads, head_dim + 2), torch.float32)
        self._call = Call(  # addresses of what this object holds
            rows=len(rows),
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            block_size=block_size,
            block_stride=pool.stride(0),
            head_stride=pool.stride(1),
            query=self._query.data_ptr(),
            count=len(self._pieces),
            pieces=self._pieces.data_ptr(),
            first=self._first.data_ptr(),
            width=self._tables.shape[1],
            tables=self._tables.data_ptr(),
            partial=self._partial.data_ptr(),
            scratch=self._scratch.data_ptr(),
        )

    @staticmethod
    def takes(ragged: Ragged, dtype: torch.dtype) -> bool:
        """Whether there are such rows, and a kernel for a pool of this dtype."""
        return dtype in ENTRIES and bool((ragged.lengths == 1).any())

    def attend(self, layer: int, query: torch.Tensor, scoring: Scoring, out: torch.Tensor) -> None:
        """From `query` to `out`, both `[T, H, head_dim]`: the rows of one token of them."""
        asked = query if self._all else query[self._tokens]
        self._query.copy_(asked).mul_(scoring.scale)  # in fp32, not in the query's dtype
        straight = self._all and out.dtype is torch.float32
        attended = out if straight else torch.empty_like(self._query)
        start = layer * self._pool.stride(2)
        sinks = None if scoring.sinks is None else scoring.sinks.to(torch.float32).contiguous()
        self._call.keys = self._pool.data_ptr() + start * self._pool.element_size()
        self._call.sinks = 0 if sinks is None else sinks.data_ptr()
        self._call.softcap = scoring.softcap or 0.0
        self._call.out = attended.data_ptr()
        self._kernel.run(self._call, self._threads)
        if not straight:
            out.index_copy_(0, self._tokens, attended.to(out.dtype))


def pieces(contexts: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read of rows with these contexts: row, first position and the one after the last, int64 `[N, 3]`, none
    across a multiple of `PIECE`; and where each row's begin, int64 `[rows + 1]`."""
    seen_from = torch.zeros_like(contexts) if window is None else (contexts - window).clamp_(min=0)
    counts = (contexts - 1) // PIECE - seen_from // PIECE + 1
    first = torch.zeros(len(contexts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=first[1:])
    row = torch.repeat_interleave(torch.arange(len(contexts)), counts)
    begin = (seen_from[row] // PIECE + torch.arange(len(row)) - first[row]) * PIECE
    end = torch.minimum(begin + PIECE, contexts[row])
    return torch.stack([row, torch.maximum(begin, seen_from[row]), end], dim=1).contiguous(), first
