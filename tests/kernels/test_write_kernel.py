"""Storing keys and values against its plain twin: the same bytes in the same places, and no others."""

import pytest
import torch

from kvferry.kernels.reference import kv_write
from kvferry.kernels.write_kernel import ONE_THREAD, SlotWriter

KV_HEADS, LAYERS, BLOCK_SIZE, HEAD_DIM = 3, 2, 4, 24


def new(tokens: int, dtype: torch.dtype, laid_out: str) -> torch.Tensor:
    """`[tokens, kv_heads, head_dim]`, as models may hand it over."""
    if laid_out == "tokens first":
        return torch.randn(tokens, KV_HEADS, HEAD_DIM).to(dtype)
    if laid_out == "heads first":
        return torch.randn(KV_HEADS, tokens, HEAD_DIM).to(dtype).transpose(0, 1)
    return torch.randn(tokens, HEAD_DIM, KV_HEADS).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("laid_out", ["tokens first", "heads first", "dims not last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 9, 600])
def test_slots_are_written(tokens, dtype, laid_out):
    torch.manual_seed(tokens)
    pool = torch.full((200, KV_HEADS, LAYERS, 2, BLOCK_SIZE, HEAD_DIM), torch.nan, dtype=dtype)
    expected, slots = pool.clone(), torch.randperm(200 * BLOCK_SIZE)[:tokens]
    key, value = new(tokens, dtype, laid_out), new(tokens, dtype, "tokens first")
    SlotWriter(pool, slots).write(1, key, value)
    kv_write(expected, 1, slots, key, value)
    assert torch.equal(pool.nan_to_num(7), expected.nan_to_num(7))
    assert (~pool.isnan()).sum() == 2 * key.numel()


def test_other_numbers_become_the_pools():
    pool = torch.zeros(4, KV_HEADS, LAYERS, 2, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16)
    key, value = torch.randn(5, KV_HEADS, HEAD_DIM), torch.randn(5, KV_HEADS, HEAD_DIM)
    SlotWriter(pool, torch.arange(5)).write(0, key, value)
    assert torch.equal(pool[1, :, 0, 0, 0], key[4].bfloat16())
    assert torch.equal(pool[0, :, 0, 1, 3], value[3].bfloat16())


def test_both_ways_of_sharing_the_work_are_tested():
    assert 2 * 9 * KV_HEADS * HEAD_DIM * 8 < ONE_THREAD < 2 * 600 * KV_HEADS * HEAD_DIM * 2
