"""What `serve` starts is what it was told: each child's command line gives it the configuration of the plan."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvferry.cli import serve
from kvferry.cli.flags import understood
from kvferry.cli.layers import Settings, resolve
from kvferry.cli.models import Found
from kvferry.cli.plan import ROUTER_DRAIN_S, Plan, lines, make_plan, ready_line, stages, understood_plan, with_model
from kvferry.cli.roles import FLAGS
from kvferry.common.errors import ConfigError

FOLDER = Path("/run/kvferry-test")
FOUND = Found(Path("/models/m"), "m", SimpleNamespace(), ())


def plan_of(cores: int = 4, environment: dict[str, str] | None = None, **flags: object) -> Plan:
    said = {path.replace("__", "."): value for path, value in {"engine__model": "m", **flags}.items()}
    settings = resolve(serve.FLAGS.names(), said, environment or {}, None)
    return with_model(make_plan(settings, FOLDER, cores), FOUND)


def told(role: str, argv: tuple[str, ...]) -> Settings:
    """What a child makes of its command line, with an environment that says nothing."""
    by_name = {name: path for path, name in FLAGS[role].names().items()}
    given: dict[str, object] = {}
    for word in argv:
        name, equals, text = word.partition("=")
        path = by_name[name] if equals else by_name["MODEL"]
        given[path] = [*given.get(path, []), text] if isinstance(given.get(path, []), list) else text
        if path == "engine.model" or not FLAGS[role].settings[path].many:
            given[path] = text if equals else word
    return resolve(FLAGS[role].names(), given, {}, None)


def test_children_are_told_what_the_plan_says():
    environment = {"KVFERRY_ENGINE_MAX_NUM_SEQS": "7", "KVFERRY_DECODE_DRAIN_SECONDS": "3"}
    plan = plan_of(
        5, environment, serve__prefill="2", store__size="2MiB", engine__kv_cache_size="3MiB", log_level="ERROR",
        router__limits__prompts="9", router__port="0", engine__served_model_name=["other", "that"],
    )  # fmt: skip
    (store,), (first, second, decode, router) = stages(plan, ("python", "kvferry"))
    assert [spec.name for spec in (store, first, second, decode, router)] == [
        "store", "prefill-0", "prefill-1", "decode-0", "router"]  # fmt: skip
    assert [spec.restart for spec in (store, first, decode, router)] == [True, True, True, False]
    for spec in (store, first, decode, router):
        assert spec.argv[:3] == ("python", "kvferry", spec.name.partition("-")[0])
    assert told("store", store.argv[3:]).of("store") == plan.store
    for role, spec, worker in (("prefill", second, plan.prefill[1]), ("decode", decode, plan.decode[0])):
        settings = told(role, spec.argv[3:])
        engine = settings.of("engine")
        assert settings.of(role, role=role, engine=engine) == worker
        assert (engine.max_num_seqs, engine.kv_cache_bytes, engine.model) == (7, 3 * 2**20, "/models/m")
        assert settings.of("") == plan.logs
    assert plan.decode[0].drain_s == 3
    settings = told("router", router.argv[3:])
    assert settings.of("router") == plan.router
    assert settings.of("router.limits") == plan.limits
    assert plan.limits.prompts == 9
    assert {one.served_model_name for one in plan.engines} == {("other", "that")}
    assert {one.tokenizer for one in plan.engines} == {"/models/m"}
    assert [worker.engine.threads for worker in plan.workers] == [2, 2, 1]


def test_arguments_of_one_role_go_to_it_alone():
    plan = plan_of(serve__prefill_arg=["--failpoint=a=kill", "--drain-seconds=1"])
    (store,), (prefill, decode, router) = stages(plan, ())
    assert prefill.argv[-2:] == ("--failpoint=a=kill", "--drain-seconds=1")
    assert not [spec for spec in (store, decode, router) if "--drain-seconds=1" in spec.argv]


def test_no_more_answers_than_a_worker_gives():
    """What the API tells of `n` is what is enforced."""
    assert plan_of().limits.n == 64
    assert plan_of(engine__max_num_seqs="32").limits.n == 32
    assert plan_of(engine__max_num_batched_tokens="16").limits.n == 16
    assert plan_of(router__limits__n="8").limits.n == 8


def test_a_plan_as_its_processes_understand_it():
    assert understood_plan(plan_of()) == plan_of()
    plan = understood_plan(plan_of(serve__decode_arg=["--max-num-seqs=3"], serve__router_arg=["--port=81"]))
    assert [one.max_num_seqs for one in plan.engines] == [64, 3]
    assert plan.router.port == 81


def test_a_threads_flag_is_for_each_worker():
    assert [one.engine.threads for one in plan_of(engine__threads="3").workers] == [3, 3]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"serve__decode": "0"}, "--decode is 0; it must be at least 1"),
        ({"store__size": "1"}, "--store-size is 1; it must be at least 1MiB"),
        ({"router__host": "10.0.0.1"}, "without a tenants file"),
        ({"engine__dtype": "int4"}, "--dtype is 'int4'; use auto, float32"),
        ({"log_format": "xml"}, "--log-format is 'xml'; use auto"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(flags, says):
    with pytest.raises(ConfigError, match=says):
        plan_of(**flags)


def test_people_are_told_the_plan():
    plan = plan_of(2, router__host="::1", router__port="81", router__admin_port="82", store__size="4GiB")
    shown = "\n".join(lines(plan, 2**31))
    for part in ("m: 2.00 GiB of weights in /models/m", "store    4GiB", "prefill  1: device auto", "decode   1:",
                 "http://[::1]:81/v1", "http://127.0.0.1:82/metrics", "one tenant, no keys"):  # fmt: skip
        assert part in shown
    assert "prefill  0" not in "\n".join(lines(plan_of(serve__prefill="0"), 0))
    assert ready_line(plan).startswith("kvferry is ready: http://[::1]:81/v1  model m  (1 prefill, 1 decode, store 4.0")


def test_the_ready_line_names_the_ports_that_the_router_listens_at():
    """Also where it was told them as its own argument."""
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        of_serve, told = (one.getsockname()[1] for one in (taken, free))
        free.close()
        plan = plan_of(router__port="0", router__admin_port=str(of_serve), serve__router_arg=[f"--admin-port={told}"])
        plan = serve.with_ports(plan)
    assert ready_line(understood_plan(plan)).endswith(f"metrics: http://127.0.0.1:{told}/metrics)")
    assert f"ready: http://127.0.0.1:{plan.router.port}/v1" in ready_line(understood_plan(plan))
    assert plan.router.port
    (*_, router) = stages(plan, ())[-1]
    child = understood("kvferry router", FLAGS["router"], router.argv[1:]).of("router")
    assert (child.port, child.admin_port) == (plan.router.port, told)


@pytest.mark.parametrize("flag", ["--port", "--admin-port"])
def test_a_port_that_nobody_would_know_is_refused(flag):
    with pytest.raises(ConfigError, match="--router-arg: a port 0 there would not be known here"):
        serve.with_ports(plan_of(router__port="0", router__admin_port="0", serve__router_arg=[f"{flag}=0"]))


def test_serve_waits_for_a_router_that_may_drain_for_long():
    """However it was told: its default under serve is short."""
    for extra, seconds in (([], ROUTER_DRAIN_S), (["--drain-seconds=8"], 8.0)):
        *_, router = stages(plan_of(serve__router_arg=extra), ("kvferry",))[-1]
        assert router.drain_s == seconds
