"""What a request took: where each prompt token's KV came from, each token counted once; and the process's metrics."""

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from kvferry.common.proto import worker_pb2 as pb
from kvferry.router.placement import Placement

LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


@dataclass(slots=True)
class Record:
    """The account of one prompt and its answers. The flow fills it in; times are seconds on the router's clock.

    While choices go on apart from each other, each has a handover of its own. `fills` and `restores` say what each open
    one has told, by the first choice that it is for; the prompt's account is that of the one that found least, so every
    prompt token is counted once, and as computed if any of them computed it.
    """

    request_id: str
    prompt_tokens: int
    arrived: float
    placements: list[Placement] = field(default_factory=list)
    fills: dict[int, pb.Reuse] = field(default_factory=dict)
    filled: set[int] = field(default_factory=set)  # whose fill is done
    restores: dict[int, pb.Reuse] = field(default_factory=dict)
    attempts: int = 0  # of the choice that took most
    output_tokens: int = 0
    most_reusable: int | None = None  # once something has failed: what was there before we computed anything

    def note_fill(self, choice: int, report: pb.FillReport) -> None:
        if report.started:
            self.fills[choice] = report.reuse
        if report.done:
            self.filled.add(choice)

    def note_failure(self, choice: int) -> None:
        """An attempt failed. What it computed may be found in the store by the next, which is not a hit: a failover
        never raises the number of cached tokens."""
        self.note_broken_fill()
        self.fills.pop(choice, None)
        self.restores.pop(choice, None)
        self.filled.discard(choice)

    def note_broken_fill(self) -> None:
        """A fill broke. Another node, or decode, goes on from what it has published; that is not a hit either."""
        if self.most_reusable is None:
            placed = self.placements[-1].cached_tokens if self.placements else 0
            self.most_reusable = self.reused if self.served else placed

    @property
    def served(self) -> bool:
        """Whether a node has said what it found of the prompt."""
        return bool(self.fills or self.restores)

    def _source(self, choice: int | None) -> pb.Reuse:
        """Who reused on behalf of a handover: its fill where there was one, else decode."""
        return self.fills.get(choice) or self.restores.get(choice) or pb.Reuse()

    def _found(self, choice: int | None) -> int:
        return self._source(choice).gpu_tokens + self._source(choice).host_tokens

    @property
    def _counted(self) -> int | None:
        """The handover whose account is the prompt's."""
        return min(sorted({*self.fills, *self.restores}), key=self._found, default=None)

    @property
    def reused(self) -> int:
        """Prompt tokens that nobody computed for this request."""
        found = min(self._found(self._counted), self.prompt_tokens)
        return found if self.most_reusable is None else min(found, self.most_reusable)

    def as_dict(self) -> dict[str, Any]:
        """JSON's own types. `reused` + `computed` make up the prompt; `transferred` (pulled by decode though computed
        for this request) and `recomputed` (computed by decode again) stand apart."""
        choice = self._counted
        reused_gpu = min(self._source(choice).gpu_tokens, self.reused)
        computed = self.prompt_tokens - self.reused
        filled = choice in self.fills
        restored = self.restores.get(choice) or pb.Reuse()
        arrived = restored.gpu_tokens + restored.host_tokens
        on_decode = 0 if filled else computed
        again = min(restored.computed_tokens, self.prompt_tokens)
        if filled and choice not in self.filled:
            on_decode = min(computed, again)
        return {
            "reused": {"gpu": reused_gpu, "host": self.reused - reused_gpu},
            "computed": {"prefill": computed - on_decode, "decode": on_decode},
            "transferred": max(0, min(arrived, self.prompt_tokens) - self.reused) if filled else 0,
            "recomputed": again - on_decode if filled else 0,
            "bytes_pulled": sum(told.pulled_bytes for told in (*self.fills.values(), *self.restores.values())),
            "attempts": self.attempts,
        }


class Metrics:
    """The router's own counters, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # a gauge beside each counter, which says when this process began
        self.registry = CollectorRegistry()
        self.requests = Counter("kvferry_requests", "Requests by how they ended", ["outcome"], registry=self.registry)
        self.prompt_tokens = Counter(
            "kvferry_prompt_tokens",
            "Prompt tokens by where their KV came from; each token once",
            ["source"],
            registry=self.registry,
        )
        self.output_tokens = Counter("kvferry_output_tokens", "Tokens sent to clients", registry=self.registry)
        self.apart_tokens = Counter(
            "kvferry_prompt_tokens_apart",
            "Prompt tokens transferred to decode, or computed there again; counted in kvferry_prompt_tokens already",
            ["how"],
            registry=self.registry,
        )
        self.bytes_pulled = Counter("kvferry_bytes_pulled", "KV bytes pulled for requests", registry=self.registry)
        self.failed_attempts = Counter(
            "kvferry_failed_attempts", "Fills and continues that broke and were tried again", ["role"],
            registry=self.registry,
        )  # fmt: skip
        self.ttft = Histogram(
            "kvferry_ttft_seconds", "Arrival to first token", buckets=LATENCY_BUCKETS, registry=self.registry
        )
        self.itl = Histogram(
            "kvferry_itl_seconds", "Gap between tokens", buckets=LATENCY_BUCKETS, registry=self.registry
        )
        self.open_requests = Gauge("kvferry_open_requests", "Requests being served", registry=self.registry)

    def count(self, record: Record) -> None:
        """Take a finished account into the sums. A prompt that no node restored counts as nobody's."""
        if not record.served:
            self.prompt_tokens.labels("unserved").inc(record.prompt_tokens)
            return
        told = record.as_dict()
        for tier, tokens in told["reused"].items():
            self.prompt_tokens.labels(f"reused_{tier}").inc(tokens)
        for role, tokens in told["computed"].items():
            self.prompt_tokens.labels(f"computed_{role}").inc(tokens)
        for how in ("transferred", "recomputed"):
            self.apart_tokens.labels(how).inc(told[how])
        self.bytes_pulled.inc(told["bytes_pulled"])
        self.output_tokens.inc(record.output_tokens)
