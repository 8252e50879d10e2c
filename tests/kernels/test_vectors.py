"""The inner loops against NumPy, on this machine's vectors and on narrower and wider ones."""

import ctypes

import numpy as np
import pytest
from numba import cfunc, types

from kvferry.kernels import vectors
from kvferry.kernels.native import FAST, bfloats_at, floats_at, halves_at
from kvferry.kernels.vectors import products, weighted

STREAMED = {
    "fp32": (floats_at, lambda x: x),
    "bf16": (bfloats_at, lambda x: (x.view(np.uint32) >> 16).astype(np.uint16)),
    "fp16": (halves_at, lambda x: x.astype(np.float16)),
}
SIGNATURE = types.void(types.intp, types.intp, types.intp, types.int64, types.int64)


@pytest.fixture(params=[4, 8, 16])
def lanes(request, monkeypatch) -> int:
    monkeypatch.setattr(vectors, "lanes", lambda: request.param)
    return request.param


def numbers(rng: np.random.Generator, streamed: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers that the streamed kind holds exactly: as fp32, and as they lie in memory."""
    exact = (rng.integers(-64, 65, shape) / 32).astype(np.float32)
    return exact, np.ascontiguousarray(STREAMED[streamed][1](exact))


@pytest.mark.parametrize("streamed", STREAMED)
@pytest.mark.parametrize(("many", "few"), [(1, 1), (2, 8), (4, 3), (2, 1), (4, 4)])
def test_products(lanes, many, few, streamed):
    multiply, at, rng = products(many, few), STREAMED[streamed][0], np.random.default_rng(lanes)

    def call(a, b, out, count, stride):
        multiply(at(a), floats_at(b), count, floats_at(out), stride, at(a))

    compiled = cfunc(SIGNATURE, fastmath=FAST)(call)
    for count in (1, 3, 16, 48, 53):
        exact, a = numbers(rng, streamed, many, count)
        b = (rng.integers(-64, 65, (few, count)) / 32).astype(np.float32)
        out = np.full((few, many + 3), np.nan, np.float32)
        run(compiled, a, b, out, count, many + 3)
        np.testing.assert_allclose(out[:, :many], b.astype(np.float64) @ exact.T, rtol=1e-5, atol=1e-5)
        assert np.isnan(out[:, many:]).all(), "nothing else is written"


@pytest.mark.parametrize("streamed", STREAMED)
@pytest.mark.parametrize(("few", "chunks"), [(1, 1), (3, 4), (4, 4), (2, 1)])
def test_weighted(lanes, few, chunks, streamed):
    add, at, rng = weighted(few, chunks), STREAMED[streamed][0], np.random.default_rng(lanes)
    dim = chunks * lanes + 5

    def call(values, weights, sums, count, stride):
        add(at(values), dim, count, floats_at(weights), stride, floats_at(sums), at(values))

    compiled = cfunc(SIGNATURE, fastmath=FAST)(call)
    for count in (0, 1, 7, 16):
        exact, values = numbers(rng, streamed, count, dim)
        weights = rng.random((few, 20), np.float32)
        sums = rng.random((few, dim), np.float32)
        expected = sums.astype(np.float64)
        expected[:, : chunks * lanes] += (weights[:, :count] @ exact.astype(np.float64))[:, : chunks * lanes]
        run(compiled, values, weights, sums, count, 20)
        np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)


def run(compiled, *arguments: np.ndarray | int) -> None:
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * len(arguments))
    kind(compiled.address)(*(x.ctypes.data if isinstance(x, np.ndarray) else x for x in arguments))
