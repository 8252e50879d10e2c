"""Workers that do not go together: those that announce one name for different models, or run one differently."""

from collections.abc import Iterator
from itertools import combinations

from kvferry.router.nodes import Nodes, ServedModel


def conflicts(nodes: Nodes) -> Iterator[str]:
    """Each pair of workers that are ready, have a name in common and do not run the same, for an operator."""
    ready = [node for node in nodes.all if node.ready]
    for one, other in combinations(ready, 2):
        if (name := one.model.name) == other.model.name and (told := difference(one.model, other.model)):
            both = f"{one.role} {one.address} and {other.role} {other.address}"
            same = one.model.fingerprint == other.model.fingerprint
            how = "and run it differently" if same else "for different models"
            yield f"{both} announce {name!r} {how}: {told}"


def difference(one: ServedModel, other: ServedModel) -> str:
    """What sets two models, or how they are run, apart; empty if nothing does, wherever their tokenizer is."""
    found = [one.layout.differences(other.layout)]
    if one.fingerprint != other.fingerprint:
        found.append(f"model fingerprint {one.fingerprint.hex()[:12]} against {other.fingerprint.hex()[:12]}")
    found += [
        f"{name} {getattr(one, name)} against {getattr(other, name)}"
        for name in ("vocab_size", "max_model_len")
        if getattr(one, name) != getattr(other, name)
    ]
    return ", ".join(filter(None, found))
