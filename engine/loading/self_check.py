"""Whether a model's attention can be paged: found out when it is loaded, by running it on a few tokens twice.

The first forward is the model as transformers runs it, with its own eager attention and its own masks, watched layer by
layer: each layer must attend once, with keys and values of the shape that the pool has; the rule behind its mask must
be "causal, within the window it passes on", at any distance; and our attention, given the same arguments in fp32, must
give what its own gives. The second forward is the model as we run it: the end of the same tokens on the paged KV of
their beginning, next to a stranger. It must give the same keys and logits, so positions are heeded and rows of a batch
do not touch each other.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from kvferry.common.block import BlockLayout
from kvferry.common.errors import IncompatibleNode
from kvferry.engine.attention import ATTENTION_NAME, PagedBatch, paged_attention
from kvferry.engine.batch import StepPlan
from kvferry.engine.inputs import lay_out
from kvferry.kernels.workspace import Workspace

CHECK_NAME = "kvferry-self-check"
LENGTH, TAIL = 21, 3  # more than a block of the usual size
REACH = 2**20  # mask rules are compared up to this position
EXACT = 1e-3  # fp32, in deviations: rounding is far below
KEYS_ROUNDED, LOGITS_ROUNDED = 0.05, 0.3  # half precisions, where an error grows from layer to layer

NOT_NUMBERS = "computes what are not numbers"
HEEDED = {"scaling", "sliding_window", "softcap", "s_aux", "dropout"}  # by paged_attention, or without meaning here
MEANINGLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_router_logits"}

MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Watch:
    """What the first forward is watched by. `pool32`: fp32, shaped as the page pool."""

    def __init__(self, layout: BlockLayout, pool32: torch.Tensor, batch: PagedBatch):
        self.layout = layout
        self.pool32 = pool32
        self.batch = batch
        self.layers_seen: set[int] = set()

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        told: dict[str, object],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model's own attention in fp32, after ours has been compared to it. Raises IncompatibleNode."""
        layer = getattr(module, "layer_idx", None)
        if layer not in range(self.layout.layers):
            raise IncompatibleNode(f"attends in a layer {layer} that is none of its {self.layout.layers}")
        if layer in self.layers_seen:
            raise IncompatibleNode(f"attends more than once in layer {layer}")
        self.layers_seen.add(layer)
        self.check_shapes(layer, key, value)
        self.check_told(told)
        rule = getattr(mask, "kvferry_rule", None)
        if rule is None:
            raise IncompatibleNode(f"has a mask of its own in layer {layer}")
        window = told.get("sliding_window")
        check_rule(rule, window, layer)
        wide = [tensor.float() for tensor in (query, key, value)]
        if not all(tensor.isfinite().all() for tensor in wide):
            raise IncompatibleNode(f"{NOT_NUMBERS} in layer {layer}; try another --dtype than {self.layout.dtype}")
        theirs, weights = own_attention(module)(module, *wide, mask.float(), **told)
        ours, _ = paged_attention(module, *wide, None, paged_batch=self.batch, **told)
        if not apart(ours, theirs) < EXACT:
            raise IncompatibleNode(f"computes attention in layer {layer} in another way than paged attention does")
        return theirs.to(query.dtype), weights

    def check_shapes(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if key.shape != value.shape:
            raise IncompatibleNode(
                f"has keys {tuple(key.shape[1:])} and values {tuple(value.shape[1:])} that differ in shape"
            )
        if key.shape != (1, self.layout.kv_heads, LENGTH, self.layout.head_dim):
            raise IncompatibleNode(
                f"has {key.shape[1]} KV heads of {key.shape[3]} in layer {layer}, where its config says "
                f"{self.layout.kv_heads} of {self.layout.head_dim}"
            )

    def check_told(self, told: dict[str, object]) -> None:
        for name, value in told.items():
            if value is not None and name not in HEEDED | MEANINGLESS and not (name == "is_causal" and value is True):
                raise IncompatibleNode(f"tells its attention {name}, which paged attention does not know")


def watched_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    watch: Watch | None = None,
    **told: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if watch is None:
        raise IncompatibleNode("does not pass keywords on to its attention, so that it would not know its batch")
    return watch.attend(module, query, key, value, attention_mask, told)


def watched_mask(*, mask_function: MaskRule, use_vmap: bool = False, **told: object) -> torch.Tensor:
    """The model's own mask, and with it the rule by which it was made."""
    mask = eager_mask(mask_function=mask_function, use_vmap=use_vmap, **told)
    mask.kvferry_rule = None if use_vmap else mask_function  # use_vmap: the model adds a rule of its own
    return mask


AttentionInterface.register(CHECK_NAME, watched_attention)
AttentionMaskInterface.register(CHECK_NAME, watched_mask)


def check_rule(rule: MaskRule, window: int | None, layer: int) -> None:
    """Raises IncompatibleNode where `rule` is not "causal, and within `window`". It is asked about positions around
    zero, the window and every power of two, and about the first, the own and the next position seen from there."""
    edges = {0, LENGTH, window or 0, 2 * (window or 0), *(2**power for power in range(REACH.bit_length())), 3 * REACH}
    queries = sorted({max(0, edge + near) for edge in edges for near in (-1, 0, 1)})
    starts = (0, 1, 2) if window is None else (-window - 1, -window, -window + 1)
    pairs = {(q, k) for q in queries for k in (0, 1, q // 2, q - 1, q, q + 1, *(q + s for s in starts)) if k >= 0}
    at, seen = torch.tensor(sorted(pairs)).unbind(1)
    zero = torch.zeros_like(at)
    ours = (seen <= at) & (seen > at - (window or at.max() + 1))
    theirs = rule(zero, zero, at, seen)
    if not torch.equal(theirs.expand_as(ours), ours):
        q, k = at[theirs != ours][0].item(), seen[theirs != ours][0].item()
        limit = "no window" if window is None else f"a window of {window}"
        raise IncompatibleNode(
            f"masks by a rule of its own: in layer {layer}, with {limit}, position {q} "
            f"{'does not see' if ours[theirs != ours][0] else 'sees'} position {k}"
        )


def own_attention(module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The eager attention function of the file that the module, or a class it is made of, was written in."""
    for kind in type(module).__mro__:
        if (own := getattr(sys.modules[kind.__module__], "eager_attention_forward", None)) is not None:
            return own
    raise IncompatibleNode("has no eager attention to compare paged attention with")


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The root mean square of the difference, in deviations of `other`; NaN if either has one."""
    one, other = one.float(), other.float()
    return ((one - other).square().mean().sqrt() / other.std().clamp_min(1e-30)).item()


@contextmanager
def attending_by(module: PreTrainedModel, name: str) -> Iterator[None]:
    """Switch the attention of every part of the model, which may have configs of their own."""
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield
    finally:
        for config in configs.values():
            config._attn_implementation = ATTENTION_NAME


def plan_of(rows: list[tuple[list[int], int, list[int]]]) -> StepPlan:
    """Rows of (token ids, position of the first, block table)."""
    return StepPlan(
        seq_ids=list(range(len(rows))),
        token_ids=np.array([token for tokens, _, _ in rows for token in tokens], dtype=np.int64),
        positions=np.array([position for _, position, _ in rows], dtype=np.int64),
        lengths=np.array([len(tokens) for tokens, _, _ in rows], dtype=np.int64),
        tables=np.array([table for _, _, table in rows], dtype=np.int64),
        draw_rows=np.empty(0, dtype=np.int64),
        draws=[],
        copies=np.empty((0, 2), dtype=np.int64),
    )


@torch.inference_mode()
def self_check(
    module: PreTrainedModel, layout: BlockLayout, vocab_size: int, prepare: Callable[[], None] = lambda: None
) -> None:
    """Raises IncompatibleNode, by name and with the reason, for a model that paged attention would get wrong.
    `prepare` puts layers of our own into the module; it is called when the module has run as it was, so that what they
    do is checked as well."""
    try:
        run_twice(module, layout, vocab_size, prepare)
    except IncompatibleNode as error:
        raise IncompatibleNode(f"{type(module).__name__} cannot be served: it {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise IncompatibleNode(
            f"{type(module).__name__} cannot be served: it fails when its attention is paged: {reason}"
        ) from error


def run_twice(module: PreTrainedModel, layout: BlockLayout, vocab_size: int, prepare: Callable[[], None]) -> None:
    device, dtype = next(module.parameters()).device, getattr(torch, layout.dtype)
    tokens = [(7919 * (i + 1)) % vocab_size for i in range(2 * LENGTH)]
    known, stranger = tokens[:LENGTH], tokens[LENGTH:]
    blocks = -(-LENGTH // layout.block_size)
    mine, others = list(range(blocks)), list(range(blocks, 2 * blocks))
    pool32 = torch.zeros(2 * blocks, *layout.shape, device=device)
    inputs = lay_out(plan_of([(known, 0, mine)]), pool32, Workspace())
    watch = Watch(layout, pool32, inputs.batch)
    with attending_by(module, CHECK_NAME):
        expected = module(input_ids=inputs.tokens, use_cache=False, watch=watch).logits[0, -TAIL:]
    if len(watch.layers_seen) != layout.layers:
        raise IncompatibleNode(
            f"calls its attention in {len(watch.layers_seen)} of its {layout.layers} layers, so its KV cannot be paged"
        )
    if not expected.isfinite().all():
        raise IncompatibleNode(f"{NOT_NUMBERS} at its end; try another --dtype than {layout.dtype}")

    prepare()
    pool = pool32.to(dtype, copy=True)
    rows = [(stranger, 0, others), (known[-TAIL:], LENGTH - TAIL, mine)]
    got = step(module, rows, pool, keep=TAIL)
    if got.shape != expected.shape:
        raise IncompatibleNode(f"gives logits {tuple(got.shape)} when asked for those of {TAIL} tokens")
    exact = layout.dtype == "float32"
    if not apart(pool[mine, :, 0], pool32[mine, :, 0]) < (EXACT if exact else KEYS_ROUNDED):
        raise IncompatibleNode("gives a token other keys at the same position when it is computed after a prefix")
    if not apart(got, expected) < (EXACT if exact else LOGITS_ROUNDED):
        raise IncompatibleNode("gives a token other logits when it is computed after a prefix, beside another row")
    alone = step(module, [(known[-1:], LENGTH - 1, mine)], pool, keep=1)
    if not apart(alone, expected[-1:]) < (EXACT if exact else LOGITS_ROUNDED):
        raise IncompatibleNode("gives a token other logits when it is the only one that is computed")


def step(
    module: PreTrainedModel, rows: list[tuple[list[int], int, list[int]]], pool: torch.Tensor, keep: int
) -> torch.Tensor:
    """Logits `[keep, vocab]` of the last tokens of such rows (see `plan_of`), over the pool."""
    inputs = lay_out(plan_of(rows), pool, Workspace())
    tokens = inputs.tokens.shape[1]
    return module(
        input_ids=inputs.tokens,
        position_ids=inputs.positions,
        use_cache=False,
        logits_to_keep=torch.arange(tokens - keep, tokens, device=pool.device),
        paged_batch=inputs.batch,
    ).logits[0]
