"""Settings follow from the dataclasses: their names, how they are parsed, and which layer wins."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from kvferry.cli import check_config, roles, serve
from kvferry.cli.checks import check_values
from kvferry.cli.flags import PANELS, Flags, annotation, spread
from kvferry.cli.layers import resolve
from kvferry.cli.settings import SECTIONS, SETTINGS, settings_of
from kvferry.common.config import EngineConfig, LogConfig, StoreConfig
from kvferry.common.errors import ConfigError
from kvferry.common.values import setting
from kvferry.router.limits import Limits

COMMANDS = {**roles.FLAGS, "serve": serve.FLAGS, "check-config": check_config.FLAGS}
A_KEY = f"kvf-0123456789ab-{'abc' * 21}a"


def layers(text: str = "", flags: dict | None = None, folder: Path | None = None, **environment: str):
    """Resolve a file of this text, these flags by path, and an environment."""
    file = None
    if folder is not None:
        file = folder / "kvferry.toml"
        file.write_text(text)
    return resolve(serve.FLAGS.names(), flags or {}, environment, file)


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as refused:
        layers(*args, **kwargs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@dataclass(frozen=True, kw_only=True)
class Toy:
    inner: object = None
    patience_s: float = setting("How long.", 1.5)
    room_bytes: int = setting("How much.", 4096)
    loud: bool = setting("Whether.", False)
    names: tuple[str, ...] = setting("Who.", ())
    width: int | None = setting("How wide.", None, name="breadth")


def test_a_field_is_all_it_takes():
    told = {one.key: (one.path, one.variable, one.flag, one.metavar) for one in settings_of("toy", Toy)}
    assert told == {
        "patience_seconds": ("toy.patience_seconds", "KVFERRY_TOY_PATIENCE_SECONDS", "--patience-seconds", "SECONDS"),
        "room_size": ("toy.room_size", "KVFERRY_TOY_ROOM_SIZE", "--room-size", "SIZE"),
        "loud": ("toy.loud", "KVFERRY_TOY_LOUD", "--loud", "TRUE|FALSE"),
        "names": ("toy.names", "KVFERRY_TOY_NAMES", "--names", "TEXT"),
        "breadth": ("toy.breadth", "KVFERRY_TOY_BREADTH", "--breadth", "NUMBER"),
    }


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("patience_seconds", "0.25", 0.25),
        ("patience_seconds", 2, 2.0),
        ("room_size", "4KiB", 4096),
        ("room_size", 4096, 4096),
        ("loud", "True", True),
        ("loud", False, False),
        ("names", ["a", "b"], ("a", "b")),
        ("names", "a", ("a",)),
        ("breadth", "2K", 2048),
    ],
)
def test_what_is_parsed(key, given, value):
    (one,) = (one for one in settings_of("toy", Toy) if one.key == key)
    parsed = one.parse(given)
    assert (parsed, type(parsed)) == (value, type(value))
    assert one.parse(one.texts(parsed) if one.many else one.texts(parsed)[0]) == value


@pytest.mark.parametrize(
    ("key", "given", "says"),
    [
        ("patience_seconds", True, "True is not what it takes"),
        ("patience_seconds", "5s", "'5s' is not a number"),
        ("room_size", "much", "'much' is not a size"),
        ("loud", "perhaps", "neither true nor false"),
        ("loud", 1, "1 is not what it takes"),
        ("names", {"a": 1}, "is not what it takes"),
        ("breadth", "wide", "not a whole number"),
    ],
)
def test_what_is_not(key, given, says):
    (one,) = (one for one in settings_of("toy", Toy) if one.key == key)
    with pytest.raises(ConfigError, match=says):
        one.parse(given)


def test_every_field_of_a_bound_is_a_setting():
    for kind in (Limits, EngineConfig, StoreConfig, LogConfig):
        assert len(list(settings_of("any", kind))) == len(fields(kind))


def test_names_do_not_meet():
    variables = [one.variable for one in SETTINGS.values()]
    assert len(set(variables)) == len(variables)
    for flags in COMMANDS.values():
        names = list(flags.names().values())
        assert len(set(names)) == len(names)
        assert {one.section for one in flags.settings.values()} <= set(PANELS)


def test_what_is_required_has_an_example_and_what_is_followed_is_there():
    for one in SETTINGS.values():
        assert one.help.endswith(".")
        assert not one.required or one.parse(one.field.metadata["example"])
        if follows := one.field.metadata.get("follows"):
            assert follows in SETTINGS


def test_flags_of_users_of_vllm():
    names = serve.FLAGS.names().values()
    for flag in ("max-model-len", "max-num-seqs", "max-num-batched-tokens", "block-size", "served-model-name", "dtype",
                 "device", "host", "port"):  # fmt: skip
        assert f"--{flag}" in names


def test_a_later_layer_wins_and_says_so(tmp_path):
    text = 'log_level = "ERROR"\n[router]\nport = 1\nhost = "::1"\nadmin_port = 5\n[engine]\nmodel = "demo"\n'
    flags = {"router.port": "3"}
    told = layers(text, flags, tmp_path, KVFERRY_ROUTER_PORT="2", KVFERRY_ROUTER_HOST="127.0.0.2").values
    assert (told["router.port"].value, told["router.port"].source) == (3, "--port")
    assert (told["router.host"].value, told["router.host"].source) == ("127.0.0.2", "KVFERRY_ROUTER_HOST")
    assert (told["router.admin_port"].value, told["router.admin_port"].source) == (
        5, f"{tmp_path}/kvferry.toml: router.admin_port")  # fmt: skip
    assert (told["log_level"].value, told["router.admin_host"].source) == ("ERROR", "default")


def test_what_follows_another():
    told = layers(KVFERRY_ENGINE_MODEL="demo", KVFERRY_STORE_SOCKET="/s", KVFERRY_DECODE_STORE="/other").values
    assert (told["router.model"].value, told["router.model"].source) == ("demo", "as engine.model")
    assert (told["prefill.store"].value, told["decode.store"].value) == (Path("/s"), Path("/other"))


def test_lists_in_the_environment_and_the_file(tmp_path):
    told = layers(
        '[router]\nprefill = ["unix:/a", "unix:/b"]', folder=tmp_path, KVFERRY_ROUTER_DECODE="unix:/c,unix:/d"
    )
    assert told["router.prefill"] == ("unix:/a", "unix:/b")
    assert told["router.decode"] == ("unix:/c", "unix:/d")


def test_an_empty_variable_and_those_of_a_service_are_none():
    told = layers(
        KVFERRY_ROUTER_HOST="",
        KVFERRY_SERVICE_HOST="10.0.0.1",
        KVFERRY_SERVICE_PORT_HTTP="80",
        KVFERRY_PORT="tcp://10.0.0.1:80",
        KVFERRY_ROUTER_PORT="tcp://10.0.0.1:80",
        KVFERRY_PORT_80_TCP_ADDR="10.0.0.1",
    )
    assert all(one.source == "default" for one in told.values.values())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version = 2", "is a configuration of version 2, and this kvferry reads version 1"),
        ('version = "1"', "is a configuration of version '1', and this kvferry reads version 1"),
        ("[router]\nprot = 1", "there is no setting router.prot; did you mean router.port?"),
        ("[engine]\nport = 1", "there is no setting engine.port; did you mean router.port?"),
        ("[engin]\ndtype = 'auto'", "there is no table [engin]; did you mean [engine]?"),
        ("max_model_len = 1", "there is no setting max_model_len"),
        ("engine = 1", "there is no setting engine"),
        ("[router.limits]\nm = 1", "there is no setting router.limits.m"),
        ("[router]\nport = true", "router.port: True is not what it takes, which is a number"),
        ("[router]\nhost = 1", "router.host: 1 is not what it takes, which is a text"),
        ("[store]\nsize = 'big'", "store.size: 'big' is not a size; write it like 4GiB"),
        ("[router\nport = 1", "is not TOML: "),
        ("[router]\ntenants = 'abc'", "router.tenants would be a secret in"),
        ("[router]\napi_key = 'abc'", "router.api_key would be a secret in"),
        (f"[router]\ntenants_file = '{A_KEY}'", "what it was given is a secret itself"),
    ],
)
def test_a_file_that_is_wrong(text, says, tmp_path):
    sentence = refusal(text, folder=tmp_path)
    assert says in sentence
    assert str(tmp_path / "kvferry.toml") in sentence
    assert "abc" not in sentence


def test_a_file_that_cannot_be_read(tmp_path):
    for file, says in ((tmp_path / "none", "there is no configuration file"), (tmp_path, "cannot be read: Is a dir")):
        with pytest.raises(ConfigError, match=says):
            resolve({}, {}, {}, file)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        resolve({}, {}, {}, tmp_path / "bytes")


@pytest.mark.parametrize(
    ("path", "given", "says"),
    [
        ("router.admission_seconds", "-1", "is -1; it must be at least 0"),
        ("router.max_local_prefill_length", "-1", "is -1; it must be at least 0"),
        ("engine.num_gpu_blocks_override", "0", "is 0; it must be at least 1"),
        ("engine.max_num_seqs", "0", "is 0; it must be at least 1"),
        ("engine.dtype", "int8", "is 'int8'; use auto, float32, bfloat16 or float16"),
        ("router.limits.body_size", "0", "is 0; it must be at least 1"),
        ("router.limits.body_seconds", "0", "is 0; it must be a number of seconds above 0"),
        ("router.limits.n", "0", "is 0; it must be at least 1"),
        ("store.size", "1KiB", "is 1KiB; it must be at least 1MiB"),
        ("router.port", "65536", "is 65536; a port is a number from 0 (any that is free) to 65535"),
        ("log_level", "LOUD", "is 'LOUD'; use DEBUG, INFO, WARNING or ERROR"),
        ("serve.decode", "0", "is 0; it must be at least 1"),
    ],
)
def test_a_wrong_value_is_called_as_it_was_typed(path, given, says, tmp_path):
    """Flag, variable or key: whichever it was given by."""
    *_, key = path.rpartition(".")
    section = path.removesuffix(key).rstrip(".")
    flag = serve.FLAGS.names()[path]
    text = f"{f'[{section}]' if section else ''}\n{key} = '{given}'"
    for name, told in (
        (flag, layers(flags={path: given})),
        (SETTINGS[path].variable, layers(**{SETTINGS[path].variable: given})),
        (f"{tmp_path}/kvferry.toml: {path}", layers(text, folder=tmp_path)),
    ):
        with pytest.raises(ConfigError) as refused:
            check_values(told)
        assert str(refused.value) == f"{name} {says}"


def test_a_value_that_follows_another_is_called_as_that_was():
    assert layers(KVFERRY_ENGINE_MODEL="m").called(SETTINGS["router.model"]) == "KVFERRY_ENGINE_MODEL"
    assert layers().called(SETTINGS["engine.dtype"]) == "--dtype"
    assert layers().called(SETTINGS["decode.listen"]) == "decode.listen", "serve has no flag for it"


@pytest.mark.parametrize(
    ("path", "given", "value"),
    [
        ("engine.dtype", "half", "float16"),
        ("engine.dtype", "Float", "float32"),
        ("engine.dtype", "bfloat16", "bfloat16"),
        ("engine.max_model_len", "auto", None),
        ("engine.max_model_len", "-1", None),
        ("engine.max_model_len", "8K", 8192),
    ],
)
def test_words_of_users_of_vllm(path, given, value, tmp_path):
    assert layers(flags={path: given})[path] == value
    text = f"[engine]\n{path.partition('.')[2]} = {given if given == '-1' else repr(given)}"
    assert layers(text, folder=tmp_path)[path] == value


def test_a_flag_can_say_auto_over_a_file(tmp_path):
    told = layers("[engine]\nmax_model_len = 9", {"engine.max_model_len": "auto"}, tmp_path)
    assert told["engine.max_model_len"] is None
    assert told.values["engine.max_model_len"].source == "--max-model-len"


def test_a_path_may_begin_as_a_key_does():
    assert layers(KVFERRY_STORE_SOCKET="kvf-store")["store.socket"] == Path("kvf-store")


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("KVFERRY_ROUTER_PROT", "1", "there is no setting KVFERRY_ROUTER_PROT; did you mean KVFERRY_ROUTER_PORT?"),
        ("KVFERRY_PORT", "1", "there is no setting KVFERRY_PORT"),
        ("KVFERRY_ROUTER_PORT", "high", "KVFERRY_ROUTER_PORT: 'high' is not a whole number"),
        ("KVFERRY_ROUTER_TENANTS", "abc", "give its path as KVFERRY_ROUTER_TENANTS_FILE"),
        ("KVFERRY_CLUSTER_SECRET", "abc", "KVFERRY_CLUSTER_SECRET would be a secret in the environment"),
        ("KVFERRY_ROUTER_TENANTS_FILE", A_KEY, "what it was given is a secret itself"),
    ],
)
def test_an_environment_that_is_wrong(variable, value, says):
    sentence = refusal(**{variable: value})
    assert says in sentence
    assert "abc" not in sentence


def test_what_is_missing_is_told_with_every_way_to_give_it():
    with pytest.raises(ConfigError) as missing:
        layers().of("engine")
    assert str(missing.value) == (
        "MODEL is not given; give it, engine.model in a --config file or KVFERRY_ENGINE_MODEL"
    )


def test_arguments_give_the_same_values_again():
    """How `serve` tells its children: only what is not the default, and all of that."""
    flags = Flags(("engine", "store", ""), argument="engine.model")
    configs = {
        "engine": EngineConfig(model="demo", max_model_len=5, kv_cache_bytes=2**20),
        "store": StoreConfig(socket=Path("/s"), lease_s=0.5),
        "": LogConfig(log_level="ERROR"),
    }
    words = flags.arguments(configs)
    assert words == ("demo", "--max-model-len=5", "--kv-cache-size=1MiB", "--socket=/s", "--lease-seconds=0.5",
                     "--log-level=ERROR")  # fmt: skip
    by_name = {name: path for path, name in flags.names().items()}
    given = {by_name[name]: text for name, _, text in (word.partition("=") for word in words[1:])}
    told = resolve(flags.names(), {"engine.model": words[0], **given}, {}, None)
    assert {section: told.of(section) for section in configs} == configs


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("serve m --served-model-name a b --port 1", "serve m --served-model-name a --served-model-name b --port 1"),
        ("serve m --port 1 --served-model-name a b c", "serve m --port 1 --served-model-name a --served-model-name b "
                                                       "--served-model-name c"),
        ("serve m --served-model-name a --served-model-name b", None),
        ("serve m --served-model-name=a --port 1", None),
        ("serve --served-model-name a m", None),
        ("serve m", None),
        ("version", None),
        ("", None),
    ],
)  # fmt: skip
def test_names_as_users_of_vllm_give_them(line, told):
    assert spread(line.split()) == (line if told is None else told).split()


def test_names_may_be_several(tmp_path):
    path = "engine.served_model_name"
    assert layers(flags={path: ["a", "b"]})[path] == ("a", "b")
    assert layers(KVFERRY_ENGINE_SERVED_MODEL_NAME="a,b")[path] == ("a", "b")
    for text, names in (('["a", "b"]', ("a", "b")), ('"a"', ("a",))):
        assert layers(f"[engine]\nserved_model_name = {text}", folder=tmp_path)[path] == names
    with pytest.raises(ConfigError, match=r"^--served-model-name is empty; give a name"):
        check_values(layers(flags={path: ["a", ""]}))


def test_flags_have_the_help_of_the_declaration():
    option = annotation(serve.FLAGS, SETTINGS["router.port"]).__metadata__[0]
    assert option.help.startswith(SETTINGS["router.port"].help)
    assert "default: 8000" in option.help


def test_sections_are_all_there():
    assert {one.section for one in SETTINGS.values()} == set(SECTIONS)
