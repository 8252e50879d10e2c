"""What `kvferry serve` starts: each process with its configuration, and how a person is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvferry.cli.flags import understood
from kvferry.cli.layers import Settings
from kvferry.cli.models import Found
from kvferry.cli.roles import FLAGS
from kvferry.cli.supervisor import ChildSpec
from kvferry.common.config import EngineConfig, LogConfig, RouterConfig, ServeConfig, StoreConfig, WorkerConfig
from kvferry.common.errors import ConfigError
from kvferry.common.values import counted, size_text, url_of
from kvferry.router.limits import Limits

MEANWHILE: Mapping[str, str] = MappingProxyType(
    {
        "store": "prompts are computed instead of found, and the blocks that it held are lost",
        "prefill": "other prefill workers compute prompts, or decode does",
        "decode": "its requests go on at other decode workers, or wait for it",
    }
)
ROUTER_DRAIN_S = 1.5  # who waits for serve to end is not kept waiting, unless it is told otherwise


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The configuration of every process. The sockets lie in a folder that is private to this run."""

    serve: ServeConfig
    store: StoreConfig
    prefill: tuple[WorkerConfig, ...]
    decode: tuple[WorkerConfig, ...]
    router: RouterConfig
    limits: Limits
    logs: LogConfig

    @property
    def workers(self) -> tuple[WorkerConfig, ...]:
        return self.prefill + self.decode

    @property
    def engines(self) -> list[EngineConfig]:
        return [worker.engine for worker in self.workers]

    @property
    def url(self) -> str:
        return url_of(self.router.host, self.router.port) + "/v1"

    @property
    def metrics_url(self) -> str:
        return url_of(self.router.admin_host, self.router.admin_port) + "/metrics"


def make_plan(settings: Settings, folder: Path, cores: int) -> Plan:
    """What the settings ask for. Raises ConfigError for one that is wrong."""
    counts, engine, socket = settings.of("serve"), settings.of("engine"), folder / "store"
    number = counts.prefill + counts.decode
    threads = iter([engine.threads] * number if engine.threads else shared_out(cores, number))

    def workers(role: str, count: int) -> tuple[WorkerConfig, ...]:
        return tuple(
            settings.of(
                role,
                role=role,
                engine=replace(engine, threads=next(threads)),
                listen=f"unix:{folder / role}-{i}",
                store=socket,
            )
            for i in range(count)
        )

    prefill, decode = workers("prefill", counts.prefill), workers("decode", counts.decode)
    router = settings.of(
        "router",
        model=engine.model,
        revision=engine.revision,
        prefill=tuple(one.listen for one in prefill),
        decode=tuple(one.listen for one in decode),
        store=socket,
        drain_s=ROUTER_DRAIN_S,
    )
    limits = settings.of("router.limits")
    most_choices = min(engine.max_num_seqs, engine.max_num_batched_tokens)  # of one prompt: they run side by side
    return Plan(
        serve=counts,
        store=settings.of("store", socket=socket),
        prefill=prefill,
        decode=decode,
        router=router,
        limits=replace(limits, n=min(limits.n, most_choices)),
        logs=settings.of(""),
    )


def with_model(plan: Plan, found: Found) -> Plan:
    """The plan with the model that was found, which all its processes load from the same folder."""

    def there(workers: Sequence[WorkerConfig]) -> tuple[WorkerConfig, ...]:
        return tuple(replace(one, engine=found.named(one.engine)) for one in workers)

    router = replace(plan.router, model=str(found.folder), revision=None)
    return replace(plan, prefill=there(plan.prefill), decode=there(plan.decode), router=router)


def understood_plan(plan: Plan) -> Plan:
    """The plan as its processes will understand it, with the arguments that are meant for one role alone. Raises
    ConfigError for one that is wrong."""
    (store,), rest = processes(plan, ())

    def configs(spec: ChildSpec) -> dict[str, Any]:
        role, *arguments = spec.argv
        try:
            told = understood(f"kvferry {role}", FLAGS[role], arguments)
            own = {"role": role, "engine": told.of("engine")} if role in ("prefill", "decode") else {}
            sections = [section for section in FLAGS[role].sections if section != "engine"]
            return {section: told.of(section, **(own if section == role else {})) for section in sections}
        except ConfigError as error:
            raise ConfigError(f"--{role}-arg: {error}") from None

    prefill, decode, (router,) = (
        [configs(spec) for spec in rest if spec.argv[0] == role] for role in ("prefill", "decode", "router")
    )
    return replace(
        plan,
        store=configs(store)["store"],
        prefill=tuple(one["prefill"] for one in prefill),
        decode=tuple(one["decode"] for one in decode),
        router=router["router"],
    )


def stages(plan: Plan, command: Sequence[str]) -> list[list[ChildSpec]]:
    """The processes, in the order of their start, and how long the front may drain. `command`: how this program is
    called."""
    drain_s = understood_plan(plan).router.drain_s
    return [
        [spec if spec.restart else replace(spec, drain_s=drain_s) for spec in stage]
        for stage in processes(plan, command)
    ]


def processes(plan: Plan, command: Sequence[str]) -> list[list[ChildSpec]]:
    """The processes as they are called."""

    def child(role: str, name: str, configs: Mapping[str, Any], extra: Sequence[str]) -> ChildSpec:
        arguments = FLAGS[role].arguments({"": plan.logs, **configs})
        argv = (*command, role, *arguments, *extra)
        return ChildSpec(name, argv, restart=role != "router", meanwhile=MEANWHILE.get(role, ""))

    def workers(role: str, configs: Sequence[WorkerConfig], extra: Sequence[str]) -> list[ChildSpec]:
        return [child(role, f"{role}-{i}", {role: one, "engine": one.engine}, extra) for i, one in enumerate(configs)]

    store = child("store", "store", {"store": plan.store}, plan.serve.store_arg)
    router = {"router": plan.router, "router.limits": plan.limits}
    front = child("router", "router", router, plan.serve.router_arg)
    prefill = workers("prefill", plan.prefill, plan.serve.prefill_arg)
    return [[store], [*prefill, *workers("decode", plan.decode, plan.serve.decode_arg), front]]


def shared_out(cores: int, workers: int) -> list[int]:
    """CPU threads for each worker: every core once, the first workers one more where it does not divide."""
    return [max(1, cores // workers + (number < cores % workers)) for number in range(workers)]


def lines(plan: Plan, weights: int) -> list[str]:
    """The plan for people, before anything is loaded. `weights`: bytes of one worker's."""
    engine = plan.engines[0]
    pages = counted(engine.num_blocks, "block") if engine.num_blocks else size_text(engine.kv_cache_bytes)
    told = [
        f"model    {', '.join(engine.served_model_name)}: {weights / 2**30:.2f} GiB of weights in {engine.model}",
        f"store    {size_text(plan.store.size_bytes)} of KV blocks of {counted(engine.block_size, 'token')}",
    ]
    for role, workers in (("prefill", plan.prefill), ("decode", plan.decode)):
        threads = ", ".join(str(one.engine.threads) for one in workers)
        each = f"device {engine.device}, dtype {engine.dtype}, KV pages {pages}, CPU threads {threads}"
        told += [f"{role:<8} {len(workers)}: {each}"] if workers else []
    tenants = plan.router.tenants_file or "none: one tenant, no keys"
    return [*told, f"router   {plan.url}  metrics {plan.metrics_url}  tenants file {tenants}"]


def ready_line(plan: Plan) -> str:
    gib, (name, *_) = plan.store.size_bytes / 2**30, plan.engines[0].served_model_name
    return (f"kvferry is ready: {plan.url}  model {name}  ({len(plan.prefill)} prefill, "
            f"{len(plan.decode)} decode, store {gib:.1f} GiB; metrics: {plan.metrics_url})")  # fmt: skip
