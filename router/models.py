"""The models that the workers run: by name, each with its tokenizer and its makers' sampling defaults."""

import asyncio
import gc
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvferry.common.errors import ConfigError, InvalidRequest, ModelNotFound, Unavailable
from kvferry.common.values import counted
from kvferry.router.conflicts import conflicts
from kvferry.router.defaults import NO_DEFAULTS, SamplingDefaults, load_defaults
from kvferry.router.limits import Limits
from kvferry.router.nodes import Node, Nodes
from kvferry.router.placement import least_loaded
from kvferry.router.text import Tokenizer, load_tokenizer

AGAIN_S = 30.0  # after which what could not be loaded is tried again
WITHOUT_STORE = {
    "prefill": "what it computes would be computed again by decode, so it is given nothing",
    "decode": "what others compute does not come there, so it computes its prompts itself",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextSide:
    """What the router needs of a model itself."""

    tokenizer: Tokenizer
    defaults: SamplingDefaults


class Models:
    """Which models are served, as the workers announce them. Text sides are loaded once for each place they are at, and
    kept; a name belongs to whoever announces it now."""

    def __init__(self, nodes: Nodes, own_defaults: bool, promised: int = 0):
        """`promised`: answers to a prompt that a request may ask for, as far as the router is concerned."""
        self._nodes, self._own_defaults, self._promised = nodes, own_defaults, promised
        self._sides: dict[str, TextSide] = {}
        self._again_at: dict[str, float] = {}  # places that could not be loaded, and when to try once more
        self._names: dict[str, int] = {}
        self._aliases: dict[str, str] = {}  # other names, and what goes by them
        self._told: set[str] = set()  # what is logged once
        self._heard: set[str] = set()  # addresses of decode nodes that have announced a model

    async def load(self, place: str, revision: str | None = None) -> None:
        """Load what is at `place`, a folder or a Hugging Face id. Raises ConfigError."""
        tokenizer = await asyncio.to_thread(load_tokenizer, place, revision)
        defaults = NO_DEFAULTS
        if self._own_defaults:
            defaults = await asyncio.to_thread(load_defaults, place, revision)
        self.add(place, TextSide(tokenizer, defaults))
        gc.freeze()  # what was imported and loaded stays, and need not be looked through again and again

    def add(self, place: str, side: TextSide) -> None:
        self._sides[place] = side

    async def follow(self) -> None:
        """Load what workers announce, for as long as there is a router."""
        while True:
            version = self._nodes.version
            self._known()
            self._tell_operators()
            wanted = [node for node in self._nodes.decode if node.ready and self._wanted(node.model.tokenizer)]
            for node in wanted:
                await self._load_of(node)
            if wanted:
                await self._nodes.tell()  # who waits for a model may find it now
            else:
                await self._nodes.changed_since(version)

    def _tell_operators(self) -> None:
        """Log what is wrong between workers, or between them and this router; each thing once."""
        for told in (*conflicts(self._nodes), *self._broken_promises()):
            if told not in self._told:
                self._told.add(told)
                log.warning("%s", told)

    def _broken_promises(self) -> Iterator[str]:
        for node in self._nodes.decode:
            if node.ready and 0 < node.status.max_choices < self._promised:
                most = counted(node.status.max_choices, "answer")
                yield f"decode node at {node.address} gives at most {most} to a prompt; --max-n allows {self._promised}"

    def _wanted(self, place: str) -> bool:
        return place not in self._sides and time.monotonic() >= self._again_at.get(place, 0)

    async def _load_of(self, node: Node) -> None:
        model = node.model
        if not self._wanted(model.tokenizer):
            return
        try:
            return await self.load(model.tokenizer)
        except ConfigError as error:
            log.error("%s, which %s runs, is not served: %s; tell the worker by --tokenizer where it is on this host",
                      model.name, node.address, error)  # fmt: skip
        except Exception:
            log.exception("%s, which %s runs, is not served", model.name, node.address)
        self._again_at[model.tokenizer] = time.monotonic() + AGAIN_S

    def close(self) -> None:
        for side in self._sides.values():
            side.tokenizer.close()

    def can_be_served(self, node: Node) -> bool:
        """Whether a decode node is ready, and so is what is needed of its model here."""
        return node.ready and self._sides.get(node.model.tokenizer) is not None

    def decode(self, name: str) -> list[Node]:
        """The decode nodes that serve a model now, the least loaded first."""
        return [n for n in least_loaded(self._nodes.decode) if n.model.name == name and self.can_be_served(n)]

    def side_of(self, tokenizer: str) -> TextSide:
        """Of a model whose decode node can be served. Raises Unavailable."""
        if (side := self._sides.get(tokenizer)) is None:
            raise Unavailable("the model's tokenizer is not there")
        return side

    def _known(self) -> dict[str, int]:
        """The names that have been announced, and when they were first seen here, in Unix seconds."""
        for node in self._nodes.all:
            if node.ready:
                self._names.setdefault(node.model.name, int(time.time()))
                self._aliases |= dict.fromkeys(node.status.other_names, node.model.name)
                if node.role == "decode":
                    self._heard.add(node.address)
        return self._names

    def _unheard(self) -> list[Node]:
        """The decode nodes that have not yet said, since this router began, which model they run."""
        self._known()
        return [node for node in self._nodes.decode if node.address not in self._heard]

    def _called(self, asked: str | None) -> str | None:
        """The first name of what goes by this one, if anything does."""
        return asked if asked in self._known() else self._aliases.get(asked)

    def settled(self, asked: str | None) -> bool:
        """Whether it is known if a model of that name is served here; without a name, whether any is."""
        if asked is None:
            return bool(self._known())
        return self._called(asked) is not None or not self._unheard()

    def name_of(self, asked: str | None) -> str:
        """The name of the model that a request is for, of several its first. Raises ModelNotFound, InvalidRequest for a
        request that leaves open which model, Unavailable as long as it is not settled."""
        if (name := self._called(asked)) is not None:
            return name
        if not (known := self._known()):
            raise Unavailable(f"{self._nodes.missing()}; try again later")
        if not self.settled(asked):
            silent = counted(len(self._unheard()), "decode node")
            raise Unavailable(f"no worker has announced the model {asked[:64]!r} yet, and {silent} of "
                              f"{len(self._nodes.decode)} did not come so far; try again later")  # fmt: skip
        told = ", ".join(repr(name) for name in sorted(known))
        if asked is not None:
            verb = "are" if len(known) > 1 else "is"
            raise ModelNotFound(f"the model {asked[:64]!r} is not served here; {told} {verb}")
        if len(known) > 1:
            raise InvalidRequest(f"model is missing; send one of {told}", "model")
        return next(iter(known))

    def up(self) -> list[tuple[str, int, int]]:
        """Name, since when, and longest context in tokens, of each model that is served now, by name; after its first
        name a model is there under each other one."""
        known, told = self._known(), []
        for first in sorted(known):
            if nodes := self.decode(first):
                others = dict.fromkeys(name for node in nodes for name in node.status.other_names if name not in known)
                told += [(name, known[first], nodes[0].model.max_model_len) for name in (first, *others)]
        return told

    def most_choices(self, name: str) -> int | None:
        """Answers to a prompt that the workers of a model can give, as far as it is known."""
        return max((node.status.max_choices for node in self.decode(name)), default=0) or None

    def bounded(self, limits: Limits) -> Limits:
        """With the answers to a prompt that some model's workers can give."""
        found = [self.most_choices(name) for name in self._known()]
        return replace(limits, n=min([limits.n, *([max(found)] if found and None not in found else [])]))

    def missing(self) -> str:
        """Why nothing can be answered, or not as it should be, for a person; empty when all is well."""
        if (missing := self._nodes.missing()) or any(map(self.can_be_served, self._nodes.decode)):
            return missing
        return "the tokenizer of no decode node's model is loaded"

    def absent(self, addresses: bool = False) -> Iterator[str]:
        """Each worker that this router was told of and that is not there or not of full use, and each model that was
        announced and is not served while others are, for a person. Without `addresses`, which are not for everybody,
        workers go by their places in the configuration."""
        which = {}
        for nodes in (self._nodes.prefill, self._nodes.decode):
            for number, node in enumerate(nodes, start=1):
                its = f"at {node.address}" if addresses else f"{number} of {len(nodes)}"
                which[node] = f"{node.role} node {its}"
        for node, it in which.items():
            if not node.ready:
                yield f"{it} is not ready" + (f": {node.problem}" if node.problem else "")
                continue
            if node.role == "decode" and not self.can_be_served(node):
                yield f"the tokenizer of {node.model.name}, which {it} runs, is not loaded"
            if node.without_store and self._nodes.prefill:
                yield f"{it} has no store: {WITHOUT_STORE[node.role]}"
        for prefill, decode, why in self._nodes.unmatched():
            yield f"{which[decode]} has no use for the KV of {which[prefill]}: {why}"
        served = {name for name, _, _ in self.up()}
        for name in sorted(set(self._known()) - served if served else ()):
            yield f"no decode node serves {name}"
