"""However often something goes wrong between stores, nothing stays: no descriptor, thread, slot, lease or memory."""

import asyncio
import os

from peer_stories import (
    behind,
    clients_of,
    in_the_middle,
    nothing_held,
    publish,
    pulled,
    run_unless_starved,
    wires,
)

from kvferry.kvstore.peers import IDLE_MOST

COUNT = 100
ROUNDS = 3
POOLS = 2 * 16 + 1  # threads that fetch, that send, and that close the pools or find an address


def threads_of(node) -> int:
    return len(os.listdir(f"/proc/{node.process.pid}/task"))


def test_rounds_of_faults_leave_nothing(ground):
    async def story():
        redis = ground.redis()
        async with wires(1) as (wire,):
            config = {"slots": 300, "redis": redis.url}
            one, two = behind(ground, wire, **config), ground.peer(start=False, **config)
            ground.start(one, two)
            alone = two.open_fds(), threads_of(two)
            async with clients_of(ground, one, two) as (writer, reader):

                async def brought(names) -> None:
                    async def all_of_it() -> bool:
                        await publish(ground, writer, names)
                        return await pulled(ground, reader, names, holder=one.address) == COUNT

                    await ground.until(all_of_it, 20)

                seen = []
                for turn in range(ROUNDS):
                    await brought(ground.names(f"whole{turn}", COUNT))
                    names = ground.names(f"cut{turn}", COUNT)
                    assert await publish(ground, writer, names) == COUNT
                    wire.sent, wire.hold_at = 0, 2 * 2**20
                    pull = asyncio.create_task(pulled(ground, reader, names, holder=one.address))
                    await in_the_middle(wire, pull)
                    wire.cut()
                    wire.hold_at = None
                    wire.holding.clear()
                    assert await pull <= COUNT
                    await brought(names)
                    again = writer.connects
                    one.kill()
                    one.start()
                    await ground.until(lambda again=again: writer.connects > again)
                    assert await pulled(ground, reader, ground.names(f"none{turn}", 5), holder=one.address) == 0
                    await brought(ground.names(f"anew{turn}", COUNT))
                    await nothing_held(ground, writer, reader)
                    seen.append((two.open_fds(), threads_of(two)))
                print(f"descriptors and threads: {alone} alone, {seen} after each round")
                assert max(fds for fds, _ in seen) <= alone[0] + 1 + IDLE_MOST + 3, (
                    "client, fetching, asking, its epoll"
                )
                assert seen[-1][0] <= seen[0][0] + 1
                assert max(threads for _, threads in seen) <= alone[1] + POOLS
                grown = two.memory()
                one.kill()
                wire.cut()
                for turn in range(50):
                    assert await pulled(ground, reader, ground.names(f"gone{turn}", 50), holder=one.address) == 0
                await ground.until(lambda: two.open_fds() <= alone[0] + 2)  # its client, and who accepts by the wire
                assert two.memory() < grown + 8 * 2**20
                stats = await reader.stats()
                assert (stats.bad_blocks, stats.quarantined) == (0, 0)
        assert two.terminate() == 0

    run_unless_starved(story)
