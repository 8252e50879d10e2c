"""A batch's parameters as tensors, made once for as long as the same sequences draw."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from kvferry.engine.batch import Draw
from kvferry.engine.sampling.edits import Fixed, edits_logits, fixed_of
from kvferry.engine.sampling.philox import MASK32, Keys

LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)


class Way(IntEnum):
    """How a row's token is chosen, once its logits are what they shall be."""

    GREEDY = 0
    FROM_ALL = 1  # by noise, from all tokens or those that min_p leaves
    BY_COUNT = 2  # by noise, from what top_k leaves, and then perhaps top_p
    BY_SHARE = 3  # by noise, from what top_p leaves


def way_of(draw: Draw, vocab: int) -> Way:
    params = draw.params
    if params.temperature <= 0:
        return Way.GREEDY
    if 0 < params.top_k < vocab:
        return Way.BY_COUNT
    return Way.BY_SHARE if params.top_p < 1 else Way.FROM_ALL


@dataclass(frozen=True, slots=True)
class Group:
    """G rows of one batch that go one way. `rows` are theirs in the logits; `edited` is the first of theirs among the
    edited ones, None if their logits are left as they are. The parameters are `[G, 1]` on the device: `temperature` and
    `floor` (log of min_p, None if it is off) float32, `top_k` int64, `top_p` float64, `noise` as philox takes it."""

    way: Way
    edited: int | None
    draws: list[Draw]
    rows: torch.Tensor
    temperature: torch.Tensor
    floor: torch.Tensor | None
    top_k: torch.Tensor
    top_p: torch.Tensor
    seeds: tuple[torch.Tensor, torch.Tensor]
    choices: torch.Tensor

    def keys(self) -> Keys:
        """What chooses the noise of the tokens that these draws choose now."""
        positions = np.fromiter((len(draw.token_ids) for draw in self.draws), dtype=np.int64, count=len(self.draws))
        low, high = (_column(half, self.rows.device) for half in (positions & MASK32, positions >> 32))
        return Keys(*self.seeds, low, high, self.choices)


@dataclass(frozen=True, slots=True)
class Ready:
    """`draws` are told from others by identity: their parameters never change. `plain` are rows that need nothing but
    the best token of the model's own logits; `edited` the draws, with `fixed` of each, that may change theirs."""

    draws: list[Draw]
    vocab: int
    device: torch.device
    plain: int
    edited: list[Draw]
    fixed: list[Fixed]
    groups: list[Group]
    told: list[int]

    def is_for(self, draws: list[Draw], logits: torch.Tensor) -> bool:
        return self.draws == draws and self.vocab == logits.shape[1] and self.device == logits.device


def make_ready(draws: list[Draw], logits: torch.Tensor, before: Ready | None) -> Ready:
    """For `draws` and `logits[D, vocab]`. What is known of draws that were there `before` is kept."""
    vocab, device = logits.shape[1], logits.device
    known = (
        {id(d): f for d, f in zip(before.edited, before.fixed, strict=True)} if before and before.vocab == vocab else {}
    )
    members: dict[tuple[bool, Way], list[int]] = {}
    for row, draw in enumerate(draws):
        members.setdefault((not edits_logits(draw), way_of(draw, vocab)), []).append(row)
    plain = len(members.pop((True, Way.GREEDY), ()))
    groups: list[Group] = []
    edited: list[Draw] = []
    for (unedited, way), rows in sorted(members.items()):
        its = [draws[row] for row in rows]
        groups.append(_group(way, None if unedited else len(edited), its, rows, vocab, device))
        if not unedited:
            edited += its
    return Ready(
        draws=list(draws),
        vocab=vocab,
        device=device,
        plain=plain,
        edited=edited,
        fixed=[known.get(id(draw)) or fixed_of(draw, vocab) for draw in edited],
        groups=groups,
        told=[row for row, draw in enumerate(draws) if draw.params.logprobs is not None],
    )


def _group(
    way: Way, edited: int | None, draws: list[Draw], rows: Sequence[int], vocab: int, device: torch.device
) -> Group:
    params = [draw.params for draw in draws]
    seeds = np.array([p.seed for p in params], dtype=np.uint64)
    min_p = np.array([p.min_p for p in params])
    with np.errstate(divide="ignore"):
        floor = np.log(min_p).astype(np.float32)
    return Group(
        way=way,
        edited=edited,
        draws=draws,
        rows=torch.tensor(rows, device=device),
        temperature=_column(np.array([p.temperature for p in params], dtype=np.float32), device).clamp_(
            min=LEAST_TEMPERATURE
        ),
        floor=_column(floor, device) if min_p.any() else None,
        top_k=_column(np.array([p.top_k if 0 < p.top_k < vocab else vocab for p in params]), device),
        top_p=_column(np.array([min(p.top_p, 1.0) for p in params], dtype=np.float64), device),
        seeds=(
            _column((seeds & np.uint64(MASK32)).astype(np.int64), device),
            _column((seeds >> np.uint64(32)).astype(np.int64), device),
        ),
        choices=_column(np.array([p.choice for p in params], dtype=np.int64), device),
    )


def _column(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values)[:, None].to(device)
