"""A process on its machine: the threads it should start, the sockets it may have."""

import os

import pytest

from kvferry.common.errors import ConfigError
from kvferry.common.process import claim_socket_path, usable_cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("200000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("150000 50000", 3)],
)
def test_the_cores_are_those_of_affinity_and_quota(quota, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5, 7})
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n")
    assert usable_cores(file) == cores


def test_without_a_cgroup_the_affinity_counts(tmp_path):
    assert usable_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_a_socket_whose_folder_is_missing_is_told_before_anything_is_taken(tmp_path):
    with pytest.raises(ConfigError, match=f"there is no folder {tmp_path}/run for the socket of the store; make it"):
        claim_socket_path(tmp_path / "run" / "store", "the store")
    claim_socket_path(tmp_path / "store", "the store")
