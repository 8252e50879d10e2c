"""A scheduler over a pool whose memory is simulated: every position of KV is checked when a step reads it, so a block
shared, freed, copied or written at the wrong moment shows, and every sequence must get the tokens it gets alone."""

from collections import Counter
from hashlib import blake2b

from kvferry.common.block import BlockLayout
from kvferry.common.hashing import CacheScope, TenantKeys
from kvferry.common.sampling import SamplingParams
from kvferry.engine.batch import Outcome
from kvferry.engine.page_pool import PagePool
from kvferry.engine.scheduling.scheduler import Scheduler
from kvferry.engine.sequence import Sequence, Status

BLOCK = 4
VOCAB = 24
STOP = 0
LONGEST = 40
TENANTS = ("a", "b", "c")
SCOPES = {
    name: CacheScope(TenantKeys.of(name.encode() * 32), b"f", BlockLayout(1, 1, BLOCK, 1, "float32"))
    for name in TENANTS
}
# Few first tokens, so that prefixes are shared, and differ after one, two or three blocks.
PROMPTS = [[1] * 14, [1] * 5 + [2] * 9, [1] * 9 + [3] * 5, [4] * 14]


def kv_of(scope: CacheScope, tokens: list[int]) -> bytes:
    """What a model would keep for the last of these tokens: it depends on all of them."""
    return blake2b(bytes(tokens), key=scope.keys.chain, digest_size=8).digest()


def next_token(tokens: list[int], choice: int) -> int:
    return blake2b(bytes(tokens), key=bytes([choice]), digest_size=8).digest()[0] % VOCAB


def alone(prompt: list[int], params: SamplingParams, limit: int, choice: int) -> list[int]:
    """The tokens that a sequence generates with nobody else there."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens, choice))
        count = len(tokens) - len(prompt)
        stopped = tokens[-1] == STOP and count > params.min_tokens
        if stopped or count >= min(params.max_tokens, limit) or len(tokens) >= LONGEST:
            return tokens[len(prompt) :]


class World:
    """A scheduler, its pool, the pool's memory, and everyone who asked. One step may be in flight."""

    def __init__(self, num_blocks: int, max_num_seqs: int, budget: int, max_waiting: int = 100):
        self.pool = PagePool(num_blocks)
        self.scheduler = Scheduler(self.pool, max_num_seqs, budget, max_waiting)
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.memory: dict[tuple[int, int], bytes] = {}
        self.live: dict[int, Sequence] = {}
        self.expected: dict[tuple[int, int], list[int]] = {}  # by group and choice
        self.told: dict[tuple[int, int], list[int]] = {}
        self.ended: Counter[tuple[int, int]] = Counter()
        self.uncollected: list[Sequence] = []
        self.publishing: list[list[int]] = []
        self.plan = None
        self.last_id = 0
        self.steps = self.forks = self.copies = 0

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        limit: int = 1000,
        min_tokens: int = 0,
        *,
        n: int = 1,
        tenant: str = "a",
        priority: int = 0,
        weight: float = 1.0,
    ) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, n=n)
        seq = Sequence(
            self.last_id + 1, "r", SCOPES[tenant], list(prompt), len(prompt), params, (STOP,), min(limit, max_tokens),
            LONGEST, priority=priority, weight=weight, sink=self.take,
        )  # fmt: skip
        self.scheduler.add(seq)
        self.last_id += n
        self.live[seq.id] = seq
        for choice in range(n):
            self.expected[seq.group, choice] = alone(prompt, params, limit, choice)
            self.told[seq.group, choice] = []
        return seq

    def abort(self, seq: Sequence) -> None:
        self.live.pop(seq.id)
        self.scheduler.withdraw(seq)
        self.scheduler.withdraw(seq)  # may be repeated

    def restoring(self) -> list[Sequence]:
        return self.scheduler.of(Status.RESTORING)

    def active(self) -> list[Sequence]:
        return self.scheduler.of(Status.RESTORING, Status.RUNNING)

    def movable(self) -> list[Sequence]:
        return [seq for seq in self.active() if not self.scheduler.in_flight(seq)]

    def restore(self, seq: Sequence, indices: list[int]) -> None:
        """These blocks arrive."""
        for index in indices:
            if seq.blocks_computed <= index < seq.reuse_cap and index not in seq.filled:
                block = seq.block_table[index]
                for position in range(index * BLOCK, (index + 1) * BLOCK):
                    self.memory[block, position % BLOCK] = kv_of(seq.scope, seq.token_ids[: position + 1])
                self.pool.name(block, seq.names[index])
                seq.fill(index)

    def learn_first_tokens(self, seq: Sequence) -> None:
        """Somebody else has computed the first tokens of a sequence that is being restored, and told them."""
        if len(seq.token_ids) > seq.prompt_len or seq.first_tokens or seq.limit == 1:
            return
        going_on = [choice for choice in range(seq.params.n) if len(self.expected[seq.group, choice]) > 1]
        if seq.params.n == 1:
            if going_on:
                seq.append(next_token(seq.token_ids, seq.params.choice))
                self.told[seq.group, seq.params.choice].append(seq.token_ids[-1])
        elif going_on:
            seq.first_tokens = tuple((choice, next_token(seq.token_ids, choice)) for choice in going_on)
            for choice, token in seq.first_tokens:
                self.told[seq.group, choice].append(token)

    def begin_step(self) -> bool:
        assert self.plan is None
        self.plan = self.scheduler.schedule()
        if self.plan is None:
            return False
        plan = self.plan
        assert 0 < plan.num_tokens <= self.budget
        assert plan.num_tokens == plan.lengths.sum()
        assert len(set(plan.seq_ids)) == len(plan.seq_ids) <= self.max_num_seqs
        self.written = {}
        stops = plan.lengths.cumsum()
        for row, seq_id in enumerate(plan.seq_ids):
            seq, start, length = self.scheduler._sequences[seq_id], plan.positions[row], plan.lengths[row]
            tokens = plan.token_ids[stops[row] - length : stops[row]].tolist()
            assert seq.token_ids[start : start + length] == tokens
            for position in range(start, start + length):
                place = (int(plan.tables[row, position // BLOCK]), position % BLOCK)
                assert place not in self.written, "two rows write the same place"
                self.written[place] = kv_of(seq.scope, seq.token_ids[: position + 1])
        writers = Counter(block for block, _ in self.written)
        for block in writers:
            holders = sum(block in s.block_table for s in self.scheduler._sequences.values())
            assert holders == 1, "a block that others stand in is written"
        assert not {int(b) for b in plan.copies[:, 1]} & {int(b) for b in plan.copies[:, 0]}
        return True

    def end_step(self) -> None:
        """The forward copied, wrote, read and chose; the outcome is taken in."""
        plan, self.plan = self.plan, None
        self.steps += 1
        self.copies += len(plan.copies)
        copied = {(int(to), i): self.memory.get((int(source), i)) for source, to in plan.copies for i in range(BLOCK)}
        self.memory.update(copied)
        self.memory.update(self.written)
        for row, seq_id in enumerate(plan.seq_ids):
            seq, end = self.scheduler._sequences[seq_id], int(plan.positions[row] + plan.lengths[row])
            for position in range(end):
                place = (int(plan.tables[row, position // BLOCK]), position % BLOCK)
                assert self.memory.get(place) == kv_of(seq.scope, seq.token_ids[: position + 1]), (
                    f"sequence {seq.id} reads another's KV at position {position}"
                )
            drawn = int((plan.draw_rows == row).sum())
            due = seq.params.n if end == len(seq.token_ids) and not seq.first_tokens else 0
            assert drawn == due
        tokens = [next_token(draw.token_ids, draw.params.choice) for draw in plan.draws]
        finished = self.scheduler.finish_step(Outcome(tokens))
        assert all(seq.status is Status.FINISHED for seq in finished)
        self.uncollected += finished
        for seq in self.scheduler._sequences.values():
            if seq.id not in self.live:  # it forked into known tokens, so nothing was told
                self.live[seq.id] = seq
                self.forks += 1

    def take(self, event) -> None:
        seq, key = event.seq, (event.seq.group, event.seq.params.choice)
        if seq.id not in self.live:
            assert seq.id != seq.group, "a sequence that was withdrawn is told of"
            self.live[seq.id] = seq
            self.forks += 1
        if event.token is not None:
            assert not self.ended[key], "told of after its end"
            self.told[key].append(event.token)
            ended = bool(event.finish_reason) or seq.status is Status.FINISHED
            assert self.told[key] == self.expected[key][: len(self.told[key])]
            assert ended == (self.told[key] == self.expected[key]), "ended too early, or too late"
            if ended:
                self.ended[key] += 1

    def publish(self, seq: Sequence) -> None:
        """Somebody begins to copy what a sequence has computed so far, and holds it until that is done, whatever
        becomes of the sequence."""
        blocks = seq.block_table[: seq.blocks_computed]
        self.pool.hold(blocks)
        self.publishing.append(blocks)

    def published(self, number: int) -> None:
        self.pool.release(self.publishing.pop(number))

    def collect(self) -> None:
        """The streams of finished sequences close."""
        for seq in self.uncollected:
            if seq.id in self.live:
                self.abort(seq)
        self.uncollected = []

    def check(self) -> None:
        self.scheduler.check_integrity()
        sequences = self.scheduler._sequences.values()
        held = Counter(block for seq in sequences for block in seq.block_table) + self.scheduler._tables._left
        for blocks in self.publishing:
            held.update(blocks)
        for block in range(self.pool.num_blocks):
            assert self.pool.holders(block) == held[block], "holders are not the tables that a block stands in"
        assert sum(seq.params.n for seq in self.active()) <= self.max_num_seqs

    def turn(self) -> None:
        """What an engine does between two steps, with everyone restored at once; and a step."""
        self.collect()
        self.scheduler.admit()
        for seq in self.restoring():
            self.scheduler.start(seq)
        if self.begin_step():
            self.end_step()

    def run_to_the_end(self) -> None:
        """Without new arrivals everyone finishes, with the tokens they would have alone, and nothing is held."""
        if self.plan is not None:
            self.end_step()
        while self.publishing:
            self.published(0)
        for _ in range(60 * (sum(seq.params.n for seq in self.live.values()) + 1)):
            self.turn()
            self.check()
        self.collect()
        assert not self.live, f"never finished: {self.live}"
        assert not self.scheduler._sequences
        assert self.pool.num_free == self.pool.num_blocks
