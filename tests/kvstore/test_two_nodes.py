"""Two real nodes with their clients against a plain dict: whatever happens, what is pulled is what was published under
that name, or a miss."""

import asyncio
import os
import shutil
import tempfile
import threading
import time
from hashlib import blake2b
from pathlib import Path
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from spans import ROOT, span
from store_host import Host

from kvferry.common.clock import MonotonicClock
from kvferry.common.store_api import Payload
from kvferry.kvstore import network
from kvferry.kvstore.directory import LocalTable

BLOCK_BYTES = 128 * 1024
SLOTS = 8
LENGTH = 5  # of each of the chains: together twice what an arena holds
KEYS = {"plain": None, "sealed": bytes(range(32)), "other": bytes(range(1, 33))}
CHAINS = {label: [blake2b(f"{label}-{i}".encode(), digest_size=32).digest() for i in range(LENGTH)] for label in KEYS}
TENANTS = {"plain": "x", "sealed": "x", "other": "y"}
WAIT_S = 10.0

chains = st.sampled_from(sorted(CHAINS))
hosts = st.integers(0, 1)
lengths = st.integers(1, LENGTH)
picks = st.integers(0, 99)  # of what there is then, which depends on what was quick


def payload(name: bytes, version: int) -> np.ndarray:
    return np.random.default_rng([*name, version]).integers(0, 256, BLOCK_BYTES, np.uint8)


class TwoNodes(RuleBasedStateMachine):
    """`published`: the versions of each name that anybody has ever published; a version is 32 bytes of its bytes."""

    @initialize()
    def begin(self):
        self.fds, self.threads = open_fds(), threading.active_count()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="kvf-"))
        self.table = LocalTable(MonotonicClock())
        self.shared = patch.object(network, "LocalTable", lambda clock: self.table)
        self.shared.start()
        self.hosts = [Host(self.folder, name, BLOCK_BYTES, SLOTS) for name in ("one", "two")]
        self.published = {name: set() for chain in CHAINS.values() for name in chain}
        self.leased = []  # (host, client's handle of a match, its chain)
        self.reserved = []  # (host, reservation, its chain's label, length)
        self.version = 0
        for host in self.hosts:
            self.run(host.start())

    def run(self, story):
        return self.loop.run_until_complete(asyncio.wait_for(story, WAIT_S))

    # -- what workers do --

    @rule(at=hosts, label=chains, length=lengths)
    def publish(self, at, label, length):
        async def story():
            client = self.hosts[at].client
            reservation = await client.reserve(span(CHAINS[label][:length]), tenant=TENANTS[label])
            await client.publish(reservation, self.fresh(label, length), KEYS[label])
            if reservation.lease:
                await client.release(reservation.lease)

        self.run(story())

    @rule(at=hosts, label=chains, length=lengths)
    def reserve(self, at, label, length):
        reservation = self.run(self.hosts[at].client.reserve(span(CHAINS[label][:length]), tenant=TENANTS[label]))
        if reservation.lease:
            self.reserved.append((at, reservation, label, length))

    @precondition(lambda self: self.reserved)
    @rule(pick=picks, publish=st.booleans())
    def end_reservation(self, pick, publish):
        async def story():
            at, reservation, label, length = self.reserved.pop(pick % len(self.reserved))
            client = self.hosts[at].client
            if publish:
                await client.publish(reservation, self.fresh(label, length), KEYS[label])
            await client.release(reservation.lease)

        self.run(story())

    @rule(at=hosts, label=chains, length=lengths, named=st.booleans(), keep=st.booleans())
    def bring(self, at, label, length, named, keep):
        self.run(self.look_up_and_pull(at, label, length, named, keep))

    @rule(label=chains, others=chains, length=lengths)
    def bring_both_ways_at_once(self, label, others, length):
        async def story():
            await asyncio.gather(
                self.look_up_and_pull(0, label, length, False, False),
                self.look_up_and_pull(0, label, LENGTH, True, False),
                self.look_up_and_pull(1, others, length, True, False),
            )

        self.run(story())

    @precondition(lambda self: self.leased)
    @rule(pick=picks)
    def end_lease(self, pick):
        async def story():
            at, match, label = self.leased.pop(pick % len(self.leased))
            await self.pull(at, match, label)
            await self.hosts[at].client.release(match.lease)

        self.run(story())

    # -- what happens to blocks and nodes --

    @rule(at=hosts, label=chains, i=st.integers(0, LENGTH - 1), spoil=st.booleans())
    def harm(self, at, label, i, spoil):
        """A block is found bad, or is bad and nobody knows."""
        host, name = self.hosts[at], CHAINS[label][i]
        block = host.index._catalog.get(name)
        if block is not None and spoil:
            host.arena.array(block.slot)[100] ^= 1
        elif block is not None:
            assert host.index.quarantine(name, block.slot)
            host.changed()

    @rule(at=hosts, tenant=st.sampled_from("xy"))
    def erase(self, at, tenant):
        self.run(self.hosts[at].client.erase(tenant))
        assert not any(self.hosts[at].index.is_there(name) for label, chain in CHAINS.items()
                       if TENANTS[label] == tenant for name in chain)  # fmt: skip

    @rule(at=hosts)
    def restart(self, at):
        async def story():
            await self.hosts[at].stop()
            await self.hosts[at].start()

        self.run(story())
        self.leased = [one for one in self.leased if one[0] != at]
        self.reserved = [one for one in self.reserved if one[0] != at]

    # -- what holds --

    @invariant()
    def whole(self):
        for host in self.hosts:
            host.index.check_integrity()
        self.table.check_integrity()

    def teardown(self):
        if not hasattr(self, "hosts"):
            return
        self.run(self.let_go_of_all())
        self.shared.stop()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.folder)
        assert (open_fds(), threading.active_count()) == (self.fds, self.threads)

    async def let_go_of_all(self):
        for at, lease in [(at, one.lease) for at, one, *_ in (*self.leased, *self.reserved)]:
            await self.hosts[at].client.release(lease)
        for host in self.hosts:
            deadline = time.monotonic() + WAIT_S / 2
            while (stats := await host.client.stats()).leases or stats.reserved or stats.writing:
                assert time.monotonic() < deadline, stats
                await asyncio.sleep(0.005)
            assert stats.free + stats.committed + stats.quarantined == stats.slots
        for host in self.hosts:
            await host.client.close()
            await host.stop()

    # -- inside --

    def fresh(self, label, length):
        """Payloads that nobody has published before."""
        self.version += 1
        names = CHAINS[label][:length]
        parts = []
        for name, parent in zip(names, [ROOT, *names], strict=False):
            data = payload(name, self.version)
            self.published[name].add(data[:32].tobytes())
            parts.append(Payload(name, parent, memoryview(data)))
        return parts

    async def look_up_and_pull(self, at, label, length, named, keep):
        client, names = self.hosts[at].client, CHAINS[label][:length]
        holder = self.hosts[1 - at].address if named else ""
        match = await client.lookup(span(names), tenant=TENANTS[label], holder=holder)
        if keep and match.lease:
            self.leased.append((at, match, label))
            return
        await self.pull(at, match, label)
        if match.lease:
            await client.release(match.lease)

    async def pull(self, at, match, label):
        room = [memoryview(np.zeros(BLOCK_BYTES, np.uint8)) for _ in range(len(match))]
        good = await self.hosts[at].client.pull(match, room, KEYS[label])
        for name, data in zip(CHAINS[label], room[:good], strict=False):
            head = bytes(data[:32])
            assert head in self.published[name], "not what was published under this name"
            version = next(v for v in range(1, self.version + 1) if payload(name, v)[:32].tobytes() == head)
            assert np.array_equal(np.frombuffer(data, np.uint8), payload(name, version))


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def stories(count: int, steps: int) -> settings:
    return settings(
        max_examples=count, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck),
        print_blob=True,
    )  # fmt: skip


TestTwoNodes = TwoNodes.TestCase
TestTwoNodes.settings = stories(12, 30)


@pytest.mark.long
def test_many_more_stories_of_two_nodes():
    run_state_machine_as_test(TwoNodes, settings=stories(100, 60))
