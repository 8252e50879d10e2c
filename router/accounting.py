"""What a request took: where each prompt token's KV came from, each token counted once; and the process's metrics."""

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvferry.common.proto import worker_pb2 as pb
from kvferry.router.placement import Placement

LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


@dataclass(slots=True)
class Record:
    """One request's account. The flow fills it in; times are seconds on the router's clock."""

    request_id: str
    prompt_tokens: int
    arrived: float
    placements: list[Placement] = field(default_factory=list)
    fill: pb.Reuse | None = None
    fill_done: bool = False
    restored: pb.Reuse | None = None
    attempts: int = 0
    output_tokens: int = 0
    most_reusable: int | None = None  # once something has failed: what was there before we computed anything

    def note_fill(self, report: pb.FillReport) -> None:
        if report.started:
            self.fill = report.reuse
        self.fill_done |= report.done

    def note_failure(self) -> None:
        """An attempt failed. What it computed may be found in the store by the next, which is not a hit: a failover
        never raises the number of cached tokens."""
        self.note_broken_fill()
        self.fill, self.restored, self.fill_done = None, None, False

    def note_broken_fill(self) -> None:
        """A fill broke. Another node, or decode, goes on from what it has published; that is not a hit either."""
        if self.most_reusable is None:
            placed = self.placements[-1].cached_tokens if self.placements else 0
            self.most_reusable = self.reused if self.fill or self.restored else placed

    @property
    def _source(self) -> pb.Reuse:
        """Who reused on behalf of the request: its fill where there was one, else decode."""
        return self.fill or self.restored or pb.Reuse()

    @property
    def reused(self) -> int:
        """Prompt tokens that nobody computed for this request."""
        found = min(self._source.gpu_tokens + self._source.host_tokens, self.prompt_tokens)
        return found if self.most_reusable is None else min(found, self.most_reusable)

    def as_dict(self) -> dict[str, Any]:
        """JSON's own types. `reused` + `computed` make up the prompt; `transferred` (pulled by decode though computed
        for this request) and `recomputed` (computed by decode again) stand apart."""
        reused_gpu = min(self._source.gpu_tokens, self.reused)
        computed = self.prompt_tokens - self.reused
        restored = self.restored or pb.Reuse()
        arrived = restored.gpu_tokens + restored.host_tokens
        on_decode = computed if self.fill is None else 0
        again = min(restored.computed_tokens, self.prompt_tokens)
        if self.fill is not None and not self.fill_done:
            on_decode = min(computed, again)
        return {
            "reused": {"gpu": reused_gpu, "host": self.reused - reused_gpu},
            "computed": {"prefill": computed - on_decode, "decode": on_decode},
            "transferred": max(0, min(arrived, self.prompt_tokens) - self.reused) if self.fill else 0,
            "recomputed": again - on_decode if self.fill else 0,
            "bytes_pulled": (self.fill.pulled_bytes if self.fill else 0) + restored.pulled_bytes,
            "attempts": self.attempts,
        }


class Metrics:
    """The router's own counters, in a registry of their own."""

    def __init__(self) -> None:
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

    def count(self, record: Record, outcome: str) -> None:
        """Take a finished request into the sums. The prompt of one that no node restored counts as nobody's."""
        self.requests.labels(outcome).inc()
        if record.fill is None and record.restored is None:
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
