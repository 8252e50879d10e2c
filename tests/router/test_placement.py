"""Where fills go, and which first token counts, without any process behind them."""

import asyncio
from types import SimpleNamespace

import pytest
from fronts import another

from kvferry.common.proto import worker_pb2 as pb
from kvferry.router.accounting import Metrics, Record
from kvferry.router.handover import Handover
from kvferry.router.nodes import Node, Nodes
from kvferry.router.placement import best_prefill, place, wait_s

PREFIXES = [[bytes([i]) * 32] for i in range(64)]


def nodes(*statuses: pb.WorkerStatus | None, role: str = "prefill") -> list[Node]:
    made = [Node(f"unix:/nowhere/{role}-{i}", role) for i in range(len(statuses))]
    for node, status in zip(made, statuses, strict=True):
        node.status = status
    return made


def busy(tokens: int, rate: float = 1000.0) -> pb.WorkerStatus:
    return pb.WorkerStatus(waiting_tokens=tokens, prefill_tokens_per_s=rate)


def in_loop(work):
    """gRPC's channels belong to an event loop."""

    async def main():
        return work()

    return asyncio.run(main())


def test_a_prefix_has_a_home_although_rates_differ_a_little():
    def homes():
        some = nodes(busy(0, 1000.0), busy(0, 1000.1))
        return [some.index(best_prefill(some, names, 100)) for names in PREFIXES], [
            some.index(best_prefill(some, names, 100)) for names in PREFIXES
        ]

    first, again = in_loop(homes)
    assert first == again
    assert 16 < sum(first) < 48, "both nodes are home to about half of the prefixes"


@pytest.mark.parametrize(("stores", "filling"), [("yyy", "01"), ("ynn", ""), ("yny", "1"), ("nyy", "")])
def test_who_has_no_store_fills_nothing_and_nothing_is_filled_for_it(stores, filling):
    """The decode node's first, then those of two prefill nodes."""

    def chosen():
        there = Nodes(("unix:/p0", "unix:/p1"), ("unix:/d",))
        for node, has in zip((*there.decode, *there.prefill), stores, strict=True):
            node.status, node.subscription.open = another(without_store=has == "n"), True
        assert there.missing() == "", "decode computes by itself"
        return "".join(node.address[-1] for node in there.partners(there.decode[0]))

    assert in_loop(chosen) == filling


def test_a_home_that_is_clearly_busier_is_left():
    def chosen():
        some = nodes(busy(0), busy(0))
        home = best_prefill(some, PREFIXES[0], 100)
        other = next(node for node in some if node is not home)
        home.status = busy(40)
        stays = best_prefill(some, PREFIXES[0], 100)
        home.status = busy(400)
        return home, other, stays, best_prefill(some, PREFIXES[0], 100)

    home, other, stays, leaves = in_loop(chosen)
    assert stays is home
    assert leaves is other


def test_a_node_that_is_gone_can_be_weighed():
    assert in_loop(lambda: wait_s(nodes(None)[0], 100)) == 0


@pytest.mark.parametrize(("cached", "filled"), [(0, True), (936, False), (935, True)])
def test_what_decode_computes_itself(cached, filled):
    def placement():
        (decode,) = nodes(busy(0), role="decode")
        return place(decode, nodes(busy(0)), PREFIXES[0], 1000, cached, 64)

    assert (in_loop(placement).prefill is not None) is filled


def test_a_second_fill_that_ends_early_does_not_count():
    """The first fill's token was sent; another one's, even if it would end the request, is relayed as progress."""

    async def main():
        (decode,), (prefill,) = nodes(busy(0), role="decode"), nodes(busy(0))
        placement = place(decode, [prefill], PREFIXES[0], 1000, 0, 64)
        record = Record("r", 1000, 0.0, placements=[placement])
        handover = Handover(pb.Sequence(request_id="r"), placement, SimpleNamespace(), record, Metrics())
        relayed, sent = [], handover._out
        handover._continue = SimpleNamespace(
            write=lambda m: note(m.progress), done_writing=nothing, cancel=lambda: None
        )

        async def note(progress):
            relayed.append((progress.committed_blocks, [one.token_id for one in progress.first_tokens], progress.done))

        progress = pb.FillProgress()
        first, other = pb.FirstToken(token_id=7), pb.FirstToken(token_id=2, finish_reason="stop")
        await handover._take(pb.FillReport(first_tokens=[first], committed_blocks=3), progress)
        await handover._take(pb.FillReport(first_tokens=[other], committed_blocks=5, done=True), progress)
        assert sent.qsize() == 1
        assert sent.get_nowait().token_ids == (7,)
        assert relayed == [(3, [7], False), (5, [7], True)]
        await handover.close()
        assert (decode.streams, prefill.streams) == (0, 0)

    asyncio.run(main())


async def nothing() -> None:
    return
