"""Where compiled kernels are kept, and that they are made anew when their sources change."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from numba import carray

from kvferry.kernels import native

KERNELS = Path(native.__file__).parent
RUN = """
import sys, types, torch
house = types.ModuleType("kvferry"); house.__path__ = [sys.argv[1]]; sys.modules["kvferry"] = house
from kvferry.kernels import few_rows
kernel = few_rows.linear_kernel(torch.float32)
print(kernel._compiled.cache_hits, few_rows.few_rows(torch.ones(1, 32), torch.ones(3, 32)).tolist())
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


def test_compiled_kernels_are_kept_until_any_source_changes(tmp_path):
    shutil.copytree(KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    right = "[[32.0, 32.0, 32.0]]"
    assert run(tmp_path) == f"0 {right}"
    assert run(tmp_path) == f"1 {right}"
    vectors = tmp_path / "kernels" / "vectors.py"
    source = vectors.read_text()
    assert "flags=" in source
    vectors.write_text(source.replace("self.builder.fadd(", "self.builder.fsub(", 1))
    assert run(tmp_path) == "0 [[0.0, 0.0, 0.0]]", "another file than the kernel's own has changed"


def test_kernels_run_where_nothing_can_be_kept(tmp_path):
    shutil.copytree(KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels" / "__pycache__").write_text("a file where the folder would be")
    nowhere = str(tmp_path / "kernels" / "vectors.py" / "nowhere")  # not even root makes a folder in a file
    assert run(tmp_path, HOME=nowhere, XDG_CACHE_HOME=nowhere, NUMBA_CACHE_DIR=nowhere) == "0 [[32.0, 32.0, 32.0]]"


def test_a_team_is_as_large_as_torch_says():
    kernel = native.Kernel(count_threads)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            seen = np.zeros(8, np.int64)
            kernel.run(seen)
            assert seen.tolist() == [threads] * threads + [0] * (8 - threads)
            kernel.run(alone := np.zeros(8, np.int64), 1)
            assert alone.tolist() == [1] + [0] * 7
    finally:
        torch.set_num_threads(before)


def count_threads(address):
    seen = native.integers_at(address)
    place = carray(seen, (8,))
    place[native.thread()] = native.threads()
