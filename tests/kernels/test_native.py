"""Where compiled kernels are kept, and that they are made anew when their sources change."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numba import carray

from kvferry.kernels import native

KERNELS = Path(native.__file__).parent
RUN = """
import sys, types, torch
house = types.ModuleType("kvferry"); house.__path__ = [sys.argv[1]]; sys.modules["kvferry"] = house
from kvferry.kernels import few_rows
if len(sys.argv) > 2:
    input("imported")
kernel = few_rows.linear_kernel(torch.float32)
print(kernel._compiled.cache_hits, few_rows.FewRows(torch.ones(3, 32))(torch.ones(1, 32)).tolist())
"""


def run(folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


RIGHT = "[[32.0, 32.0, 32.0]]"


@pytest.fixture
def house(tmp_path) -> Path:
    """A copy of the kernels, and a home, where nothing has been compiled yet."""
    shutil.copytree(KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    return tmp_path


def break_sums(house: Path) -> None:
    """Change another file than the kernel's own."""
    vectors = house / "kernels" / "vectors.py"
    source = vectors.read_text()
    assert "self.builder.fadd(" in source
    vectors.write_text(source.replace("self.builder.fadd(", "self.builder.fsub(", 1))


@pytest.mark.parametrize("beside_the_sources", [pytest.param(True, marks=pytest.mark.long), False])
def test_compiled_kernels_are_kept_until_any_source_changes(house, beside_the_sources):
    if not beside_the_sources:
        (house / "kernels" / "__pycache__").write_text("a file where the folder would be")
    home = str(house / "home")
    assert run(house, HOME=home) == f"0 {RIGHT}"
    assert run(house, HOME=home) == f"1 {RIGHT}"
    kept = house / "kernels" / "__pycache__" if beside_the_sources else house / "home" / ".cache" / "kvferry"
    assert list(kept.glob("few_rows-*/**/*.nbc"))
    break_sums(house)
    assert run(house, HOME=home) == "0 [[0.0, 0.0, 0.0]]"


def test_code_is_not_kept_as_that_of_sources_which_it_was_not_made_of(house):
    """An upgrade in place, while a node starts."""
    starting = subprocess.Popen(
        [sys.executable, "-c", RUN, str(house), "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starting.stdout.read(len("imported")) == "imported"
    break_sums(house)
    assert starting.communicate("\n", timeout=120)[0].strip() == f"0 {RIGHT}"
    assert run(house) == "0 [[0.0, 0.0, 0.0]]"


@pytest.mark.parametrize("kind", [pytest.param("nbi", marks=pytest.mark.long), "nbc"])
def test_kept_code_that_is_damaged_is_made_again(house, kind):
    assert run(house) == f"0 {RIGHT}"
    (damaged,) = house.glob(f"kernels/__pycache__/few_rows-*/**/*.{kind}")
    damaged.write_bytes(b"")
    assert run(house) == f"0 {RIGHT}"
    assert run(house) == f"0 {RIGHT}", "kept again"
    assert run(house) == f"1 {RIGHT}"


def test_kernels_run_where_nothing_can_be_kept(house):
    (house / "kernels" / "__pycache__").write_text("a file where the folder would be")
    nowhere = str(house / "kernels" / "vectors.py" / "nowhere")  # not even root makes a folder in a file
    assert run(house, HOME=nowhere) == f"0 {RIGHT}"
    assert run(house, NUMBA_CACHE_DIR=nowhere) == f"0 {RIGHT}"


def test_a_team_is_as_large_as_torch_says():
    kernel = native.Kernel(count_threads)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            seen = (ctypes.c_int64 * 8)()
            kernel.run(seen)
            assert list(seen) == [threads] * threads + [0] * (8 - threads)
            kernel.run(alone := (ctypes.c_int64 * 8)(), 1)
            assert list(alone) == [1] + [0] * 7
    finally:
        torch.set_num_threads(before)


def count_threads(address):
    seen = native.integers_at(address)
    place = carray(seen, (8,))
    place[native.thread()] = native.threads()
