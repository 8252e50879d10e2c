"""What `/ready` tells of who is missing, where some are there."""

import asyncio

from checkpoints import byte_tokenizer

from kvferry.common.proto import worker_pb2 as pb
from kvferry.router.defaults import NO_DEFAULTS
from kvferry.router.models import Models, TextSide
from kvferry.router.nodes import Nodes
from kvferry.router.text import Tokenizer

LAYOUT = pb.Layout(kv_heads=1, layers=1, block_size=16, head_dim=8, dtype="float32")


def status(name: str) -> pb.WorkerStatus:
    return pb.WorkerStatus(served_model_name=name, tokenizer=name, fingerprint=b"f" * 16, layout=LAYOUT)


def test_each_one_that_is_not_there_is_named():
    async def main() -> None:
        nodes = Nodes(("unix:/p0", "unix:/p1"), ("unix:/d0", "unix:/d1"))
        models = Models(nodes, own_defaults=False)
        models.add("red", TextSide(Tokenizer(byte_tokenizer()), NO_DEFAULTS))
        for node, name in zip(nodes.all, ("red", "red", "red", "blue"), strict=True):
            node.status, node.subscription.open = status(name), True
        assert list(models.absent()) == [
            "the tokenizer of blue, which decode node 2 of 2 runs, is not loaded",
            "no decode node serves blue",
        ]
        models.add("blue", TextSide(Tokenizer(byte_tokenizer()), NO_DEFAULTS))
        assert list(models.absent()) == []
        nodes.prefill[1].status = None
        assert models.missing() == "", "the other one does"
        assert list(models.absent()) == ["prefill node 2 of 2 is not ready"]
        nodes.prefill[1].status, nodes.decode[1].status = status("red"), None
        assert models.missing() == ""
        assert list(models.absent()) == ["decode node 2 of 2 is not ready", "no decode node serves blue"]
        models.close()
        await nodes.close()

    asyncio.run(main())
