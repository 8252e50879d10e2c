"""Which models there are, by what workers announce."""

import asyncio
from types import SimpleNamespace

import pytest
from checkpoints import byte_tokenizer

from kvferry.common.errors import ConfigError, InvalidRequest, ModelNotFound, Unavailable
from kvferry.common.proto import worker_pb2 as pb
from kvferry.router import models as models_module
from kvferry.router.conflicts import conflicts
from kvferry.router.defaults import SamplingDefaults
from kvferry.router.limits import Limits
from kvferry.router.models import Models
from kvferry.router.nodes import Nodes
from kvferry.router.text import Tokenizer

LAYOUT = pb.Layout(kv_heads=1, layers=1, block_size=16, head_dim=8, dtype="float32")
DECODE = tuple(f"unix:/nowhere/d{i}" for i in range(3))


def status(name: str, tokenizer: str, **more) -> pb.WorkerStatus:
    own = {"fingerprint": name.encode() * 8, "layout": LAYOUT, "vocab_size": 264, "max_model_len": 64} | more
    return pb.WorkerStatus(served_model_name=name, tokenizer=tokenizer, **own)


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Places that were loaded from, in order; there is nothing at `nowhere`."""
    loaded: list[str] = []

    def load_tokenizer(place, revision):
        loaded.append(place)
        if place == "nowhere":
            raise ConfigError("there is no tokenizer at nowhere")
        return Tokenizer(byte_tokenizer())

    monkeypatch.setattr(models_module, "load_tokenizer", load_tokenizer)
    monkeypatch.setattr(models_module, "load_defaults", lambda place, revision: SamplingDefaults(temperature=0.5))
    return loaded


def with_models(use) -> None:
    async def main() -> None:
        nodes = Nodes((), DECODE)
        models = Models(nodes, own_defaults=True, promised=64)
        following = asyncio.create_task(models.follow())

        async def announce(*statuses: pb.WorkerStatus | None) -> None:
            for node, one in zip(nodes.decode, statuses, strict=False):
                node.status, node.subscription.open = one, True
            await nodes.tell()

        try:
            async with asyncio.timeout(20):
                await use(SimpleNamespace(nodes=nodes, models=models, announce=announce))
        finally:
            following.cancel()
            models.close()
            await nodes.close()

    asyncio.run(main())


def test_a_model_is_there_when_its_worker_and_its_tokenizer_are(loads):
    async def use(house) -> None:
        models = house.models
        with pytest.raises(Unavailable, match="no decode node is ready"):
            models.name_of("a")
        await house.announce(status("a", "at a"))
        assert models.name_of("a") == models.name_of(None) == "a"
        assert models.up() == [], "its tokenizer is not loaded yet"
        assert models.missing() == "the tokenizer of no decode node's model is loaded"
        assert await house.nodes.wait_for(lambda: bool(models.up()), 10), "who waits is told"
        assert models.missing() == ""
        assert models.side_of("at a").defaults == SamplingDefaults(temperature=0.5)
        await house.announce(None)
        assert models.up() == []
        assert models.name_of("a") == "a", "it may come back: 503, not 404"
        await house.announce(status("a", "at a"))
        assert [(name, longest) for name, _, longest in models.up()] == [("a", 64)]
        assert loads == ["at a"], "a tokenizer is loaded once"

    with_models(use)


def test_requests_are_for_one_of_several_models(loads):
    async def use(house) -> None:
        models = house.models
        await house.announce(status("b", "at b", max_model_len=32), status("a", "at a"), status("a", "at a"))
        assert await house.nodes.wait_for(lambda: len(models.up()) == 2, 10)
        assert [(name, longest) for name, _, longest in models.up()] == [("a", 64), ("b", 32)]
        assert [node.address for node in models.decode("b")] == [DECODE[0]]
        assert {node.address for node in models.decode("a")} == set(DECODE[1:])
        with pytest.raises(ModelNotFound, match="'c' is not served here; 'a', 'b' are"):
            models.name_of("c")
        with pytest.raises(InvalidRequest, match="model is missing; send one of 'a', 'b'"):
            models.name_of(None)

    with_models(use)


def test_a_tokenizer_that_cannot_be_loaded_is_told_once(loads, caplog):
    async def use(house) -> None:
        models = house.models
        await house.announce(status("a", "nowhere"), status("b", "at b"))
        assert await house.nodes.wait_for(lambda: bool(models.up()), 10)
        await house.announce(status("a", "nowhere", running=1), status("b", "at b"))
        assert [name for name, _, _ in models.up()] == ["b"]
        assert models.decode("a") == []

    with_models(use)
    assert loads == ["nowhere", "at b"]
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1
    assert "a, which unix:/nowhere/d0 runs, is not served: there is no tokenizer at nowhere" in told[0]


def test_a_name_belongs_to_whoever_announces_it_now(loads):
    async def use(house) -> None:
        models = house.models
        await house.announce(status("a", "old"))
        assert await house.nodes.wait_for(lambda: bool(models.decode("a")), 10)
        await house.announce(status("a", "new"))
        assert await house.nodes.wait_for(lambda: bool(models.decode("a")), 10)
        assert models.decode("a")[0].model.tokenizer == "new"
        assert models.side_of("new") is not models.side_of("old")

    with_models(use)


def test_all_names_of_a_model_are_accepted_and_its_first_is_its_own(loads):
    async def use(house) -> None:
        models = house.models
        await house.announce(status("a", "at a", other_names=["x", "y", "b"]), status("b", "at b"))
        assert await house.nodes.wait_for(lambda: len(models.up()) == 4, 10)
        assert [name for name, _, _ in models.up()] == ["a", "x", "y", "b"]
        assert [models.name_of(asked) for asked in ("a", "x", "y", "b")] == ["a", "a", "a", "b"]
        await house.announce(None, status("b", "at b"))
        assert models.name_of("x") == "a", "it may come back"
        assert [name for name, _, _ in models.up()] == ["b"]
        with pytest.raises(InvalidRequest, match="send one of 'a', 'b'"):
            models.name_of(None)

    with_models(use)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_one_name_for_different_models_is_told_once(loads, caplog):
    async def use(house) -> None:
        await house.announce(status("a", "at a"), status("a", "at another place"))
        assert list(conflicts(house.nodes)) == [], "where the tokenizer is makes no other model"
        other = status("a", "at a", fingerprint=b"o" * 16, max_model_len=99)
        for running in (0, 1):
            await house.announce(status("a", "at a", running=running), other, status("b", "at b"))
            assert await house.nodes.wait_for(lambda: bool(house.models.decode("b")), 10)
        assert warnings(caplog) == list(conflicts(house.nodes)) == [
            "decode unix:/nowhere/d0 and decode unix:/nowhere/d1 announce 'a' for different models: model fingerprint "
            "616161616161 against 6f6f6f6f6f6f, max_model_len 64 against 99"
        ]  # fmt: skip
        await house.announce(status("a", "at a"), None)
        assert list(conflicts(house.nodes)) == []

    with_models(use)


def test_answers_that_no_worker_gives_are_told_once_and_not_promised(loads, caplog):
    async def use(house) -> None:
        models, limits = house.models, Limits(n=64)
        assert models.bounded(limits).n == 64, "nobody has said anything"
        for running in (0, 1):
            await house.announce(
                status("a", "at a", max_choices=8, running=running), status("a", "at a", max_choices=1)
            )
            assert await house.nodes.wait_for(lambda: bool(models.decode("a")), 10)
        assert (models.most_choices("a"), models.bounded(limits).n) == (8, 8)
        assert warnings(caplog) == [
            "decode node at unix:/nowhere/d0 gives at most 8 answers to a prompt; --max-n allows 64",
            "decode node at unix:/nowhere/d1 gives at most 1 answer to a prompt; --max-n allows 64",
        ]
        await house.announce(None, None, status("b", "at b"))
        assert await house.nodes.wait_for(lambda: bool(models.decode("b")), 10)
        assert models.most_choices("b") is None, "one that does not say"
        assert models.bounded(limits).n == 64

    with_models(use)
