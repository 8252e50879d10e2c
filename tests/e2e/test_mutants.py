"""The oracle sees faults: of a cluster with one built in it refuses an answer in every case that it claims."""

import sys
from pathlib import Path

import pytest
from checkpoints import ARCHITECTURES
from e2e.cases import CASES, Scene
from e2e.cluster import Prompts
from e2e.mutants import MUTANTS, VARIABLE

COMMAND = (sys.executable, str(Path(__file__).with_name("mutants.py")))


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch == "llama" else pytest.mark.long) for arch in ARCHITECTURES]
)
def test_every_fault_is_seen(arch, oracles, folder, own, probe_of):
    fault = folder / f"{arch}.mutant"
    fault.write_text("")
    cluster = own(arch=arch, command=COMMAND, env={VARIABLE: str(fault)})
    probe = probe_of(cluster)

    def wrong(mutant: str, case: str) -> bool:
        """Whether the oracle refuses the case's last answer (of eight at once, any)."""
        fault.write_text(mutant)
        scene = Scene(cluster, Prompts(f"{arch} {mutant} {case}"), probe)
        CASES[case](scene)
        told = [oracles[arch].refuses(reply.prompt_token_ids, reply.token_ids) for reply in scene.replies]
        return any(told) if case == "eight_at_once" else told[-1] != ""

    assert not wrong("", "cold"), "an answer is wrong without a fault"
    unseen = {mutant: [case for case in CASES if not wrong(mutant, case)] for mutant in MUTANTS}
    cluster.stop()
    assert unseen == {mutant: [] for mutant in MUTANTS}
